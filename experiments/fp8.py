"""What FP8 costs in loss: the same model and data under bfloat16 and the FP8 recipes (V3 §3.3, Appendix B).

Question: how far is each recipe's loss from bfloat16's? V3 reports less than 0.25% for the fine-grained recipe, and
that block-wise (128x128) quantisation of gradients diverged on a 16B mixture of experts (Appendix B.2).
Command, for each arm and seed, and the table of all of them:
    python -m research.main --config=experiments/fp8.py:fp8_deepseek --workdir=runs/fp8/fp8_deepseek-0 \\
        --config.training.seed=0
    python -m research.compare --baseline=bfloat16 --folder=runs/fp8
Cost: 2 to 3 minutes an arm and seed on two cores, at nano's size and a third of its steps; `float32` is a control: its
distance from bfloat16 is what rounding alone does to a run. The arms gpu_... have 124M parameters: `make gpu-train`.
Result (aa591be, two cores, seeds 0-2; validation loss relative to bfloat16's of the same seed, mean and range):
    float32 (control)         +1.63%  (+0.08 to +3.50)
    fp8_deepseek              +0.48%  (-0.47 to +1.79)
    fp8_blockwise_gradients   -0.02%  (-0.87 to +0.70)
    mxfp8                     +0.90%  (-0.12 to +1.48)
    fp8_tensor                +1.17%  (+0.68 to +1.52)
A small model's table: its noise hides differences of V3's size, no recipe can be told from float32, and block-wise
gradients do not diverge. The arms gpu_...: not yet run.
"""

from experiments import base, nano

RECIPES = ("float32", "bfloat16", "fp8_deepseek", "fp8_tensor", "mxfp8", "fp8_blockwise_gradients")

SWEEP = {name: {"precision.recipe": name} for name in RECIPES}
SWEEP |= {f"gpu_{name}": {**nano.SIZES["gpu"], "precision.recipe": name} for name in RECIPES}


def get_config(arms: str = ""):
    c, following = nano.sized(arms)
    c.precision.recipe = "fp8_deepseek"
    if following == arms:  # of no size
        c.training.steps = 600
    return base.select(c, following, SWEEP)
