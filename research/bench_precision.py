"""Speed of FP8 beside bfloat16: `python -m research.bench_precision [--part=layer|step] [--json=FILE]`.

layer: the routed experts of a layer, forward and backward, at DeepSeek-V3's width: 8 experts of one device and 32,768
rows, each of one expert drawn at random. The row `products` is what XLA makes of the nine products and SwiGLU alone in
bfloat16, with equal loads and nothing routed: no layer in 16 bits is faster.
step: one training step, on real text with the real router as initialised, of a model of a billion parameters in V3's
proportions (on a CPU: of experiments/nano.py, beside float32); --config and --config.group.field=value name another.
MFU is of the peak of bfloat16 products, with causal attention counted as half of full attention and as full.
"""

import dataclasses
import json
import os
import statistics
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from absl import flags

from research import command, experiment
from research.errors import RequestError

FLAGS = flags.FlagValues()
PARTS = ("layer", "step")
_PART = flags.DEFINE_enum("part", None, PARTS, "Only this part.", FLAGS)
_JSON = flags.DEFINE_string("json", None, "Also writes results here, after each part.", FLAGS)
_CONFIG = flags.DEFINE_string("config", None, "The experiment whose step is timed.", FLAGS)
_FIELDS = flags.DEFINE_multi_string("config.", [], "--config.group.field=value changes a field of it.", FLAGS)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each recipe's step.", 1, None, FLAGS)
_STEPS = flags.DEFINE_integer("steps", 5, "Steps in a turn.", 1, None, FLAGS)

BASELINE, RECIPE = "bfloat16", "fp8_deepseek"
ON_GPU = "experiments/ladder.py:1b"
# Wider and shallower than that rung, 1.03B in all: its widths are no multiples of the tiles' 128, these are.
ON_GPU_FIELDS = ("model.hidden_size=1792", "model.num_hidden_layers=6", "training.batch_size=16")
ON_CPU = "experiments/nano.py"


class Layer(NamedTuple):
    """Routed experts of one device."""

    rows: int
    experts: int
    width: int
    hidden: int

    @property
    def flops(self) -> float:
        """Of three matrices, each in three products."""
        return 3 * 3 * 2.0 * self.rows * self.width * self.hidden


DEEPSEEK, SMALL = Layer(32768, 8, 7168, 2048), Layer(1024, 8, 256, 128)


def layer_arguments(shape: Layer) -> tuple:
    """x, the three weights, the weights of the rows, their experts, and the gradient of y."""
    import jax
    import jax.numpy as jnp

    (X, E, D, F), keys = shape, jax.random.split(jax.random.key(0), 7)
    return (jax.random.normal(keys[0], (X, D), jnp.bfloat16),
            *(jax.random.normal(key, (E, D, F)) * D**-0.5 for key in keys[1:3]),
            jax.random.normal(keys[3], (E, F, D)) * F**-0.5, jax.random.uniform(keys[4], (X, 1)),
            jax.random.randint(keys[5], (X, 1), 0, E), jax.random.normal(keys[6], (X, D), jnp.bfloat16))


def layer_of(recipe: str):
    """(y, gradients) of `layer_arguments` under a recipe."""
    import jax

    from research.precision.products import Products
    from research.precision.recipe import RECIPES

    def run(x_XD, gate_EDF, up_EDF, down_EFD, weights_XK, indices_XK, dy_XD):
        def forward(x_XD, gate_EDF, up_EDF, down_EFD, weights_XK):
            return Products(RECIPES[recipe]).experts(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK, {})

        y_XD, backward = jax.vjp(forward, x_XD, gate_EDF, up_EDF, down_EFD, weights_XK)
        return y_XD, backward(dy_XD)

    return run


def products_alone(x_XD, gate_EDF, up_EDF, down_EFD, weights_XK, indices_XK, dy_XD):
    """(y, gradients) of equally loaded experts whose rows lie together, in 16 bits throughout."""
    import jax
    import jax.numpy as jnp

    def forward(x_ECD, gate_EDF, up_EDF, down_EFD):
        return (jax.nn.silu(x_ECD @ gate_EDF) * (x_ECD @ up_EDF)) @ down_EFD

    E, D, _ = gate_EDF.shape
    weights = (w.astype(jnp.bfloat16) for w in (gate_EDF, up_EDF, down_EFD))
    y_ECD, backward = jax.vjp(forward, x_XD.reshape(E, -1, D), *weights)
    return y_ECD, backward(dy_XD.reshape(E, -1, D))


def measure_layer(on_gpu: bool) -> dict:
    """Times the layer and prints its table."""
    import jax

    from kernels import timing

    shape, effort = (DEEPSEEK, timing.CAREFUL) if on_gpu else (SMALL, timing.ROUGH)
    print(f"layer, forward and backward: {shape.rows:,} rows, {shape.experts} experts of {shape.width} x {shape.hidden}"
          + ("" if on_gpu else "; a small one, which says nothing about a GPU"))
    print(f"{'':<14}{'us':>12}{'range':>23}{'TFLOP/s':>10}{'x bf16':>8}{'x products':>12}", flush=True)
    arguments, rows = jax.jit(partial(layer_arguments, shape))(), {}
    for name, function in (("products", products_alone), (BASELINE, layer_of(BASELINE)), (RECIPE, layer_of(RECIPE))):
        seconds = timing.Timed(function, [arguments], shape.flops / 1e15, effort).measure()
        rows[name] = {"us": 1e6 * seconds.median, "us_range": [1e6 * seconds.least, 1e6 * seconds.greatest],
                      "tflops": shape.flops / seconds.median / 1e12}
        row = rows[name]
        ratios = [f"{rows[other]['us'] / row['us']:.2f}" if other in rows else "" for other in (BASELINE, "products")]
        spread = "-".join(f"{us:,.0f}" for us in row["us_range"])
        print(f"{name:<14}{row['us']:>12,.0f}{spread:>23}{row['tflops']:>10.4g}{ratios[0]:>8}{ratios[1]:>12}",
              flush=True)
    return {"shape": shape._asdict(), "rows": rows}


class Stepper:
    """Training steps of one recipe, on batches of its own."""

    def __init__(self, settings, corpus):
        from research.data.pipeline import TrainBatches
        from research.model.build import make_model
        from research.parallel.mesh import make_mesh
        from research.training.step import init_state, make_train_step

        self.batches = TrainBatches(corpus, settings)
        model, batch = make_model(settings, make_mesh(settings)), next(self.batches)
        self.state = init_state(model, settings)
        self.step = make_train_step(model, settings).lower(self.state, batch).compile()
        self.metrics = {}

    def seconds(self, steps: int) -> float:
        """Takes so many steps; seconds of one."""
        import jax

        batches = [next(self.batches) for _ in range(steps)]
        start = time.perf_counter()
        for batch in batches:
            self.state, self.metrics = self.step(self.state, batch)
        jax.block_until_ready(self.metrics)
        return (time.perf_counter() - start) / steps


def flops_per_token(settings) -> dict[str, float]:
    """Of training, with causal attention as half of full attention (what is computed) and as full."""
    from research.accounting import flops

    # attention's FLOPs a token grow with the length: all positions are twice as many as those that came before
    twice = SimpleNamespace(sequence_length=2 * settings.data.sequence_length)
    return {"causal": flops.training_per_token(settings),
            "full": flops.training_per_token(dataclasses.replace(settings, data=twice))}


def peak_flops(on_gpu: bool) -> float:
    """FLOP/s of bfloat16 products by the GPU's data sheet, else of the best product measured here."""
    import jax

    from kernels.comparison import PEAKS
    from research import environment

    fp8 = PEAKS.get(jax.devices()[0].device_kind) if on_gpu else None
    return fp8 / 2 if fp8 else environment.matmul_peak()


def measure_step(on_gpu: bool, config, name: str) -> dict:
    """Times the training step under each recipe, in turn, and prints its table."""
    from research import config as schema
    from research import environment
    from research.accounting import parameters
    from research.data.pipeline import load_corpus

    recipes = (BASELINE, RECIPE) if on_gpu else ("float32", BASELINE, RECIPE)
    of = {recipe: schema.check(experiment.change(config, [f"precision.recipe={recipe}"])) for recipe in recipes}
    corpus = load_corpus(of[BASELINE])
    of = {recipe: settings.with_vocabulary(corpus.tokenizer.vocab_size) for recipe, settings in of.items()}
    flops, peak, count = flops_per_token(of[BASELINE]), peak_flops(on_gpu), parameters.count(of[BASELINE])
    tokens = config.training.batch_size * config.data.sequence_length
    print(f"step of {name}: {count['total'] / 1e6:,.0f}M parameters, {count['active'] / 1e6:,.0f}M active, {tokens:,} "
          f"tokens of {config.data.source}; {_ROUNDS.value} turns of {_STEPS.value} steps; MFU of {peak / 1e12:,.3g} "
          f"TFLOP/s", flush=True)
    steppers = {}
    for recipe, settings in of.items():
        steppers[recipe] = Stepper(settings, corpus)
        steppers[recipe].seconds(2)
    environment.pin_threads()
    taken = {recipe: [] for recipe in recipes}
    for turn in range(_ROUNDS.value):
        for recipe in recipes if turn % 2 == 0 else reversed(recipes):  # none is always the one that goes first
            taken[recipe].append(steppers[recipe].seconds(_STEPS.value))
    first = f"x {recipes[0]}"
    print(f"{'':<14}{'tokens/s':>12}{'range':>21}{'ms':>9}{'MFU causal':>12}{'MFU full':>10}{'x bf16':>8}{'MaxVio':>8}"
          + ("" if on_gpu else f"{first:>11}"))
    rows = {}
    for recipe in recipes:
        steppers[recipe].batches.close()
        seconds = statistics.median(taken[recipe])
        row = rows[recipe] = {
            "tokens_per_second": tokens / seconds, "range": [tokens / max(taken[recipe]), tokens / min(taken[recipe])],
            "ms": 1e3 * seconds, "mfu": {kind: n * tokens / seconds / peak for kind, n in flops.items()},
            "load_violation": float(steppers[recipe].metrics.get("load_violation", 0)),
            "times_as_fast_as": {other: statistics.median(
                theirs / ours for theirs, ours in zip(taken[other], taken[recipe], strict=True)) for other in recipes}}
        spread = "-".join(f"{rate:,.0f}" for rate in row["range"])
        print(f"{recipe:<14}{row['tokens_per_second']:>12,.0f}{spread:>21}{row['ms']:>9.1f}"
              f"{row['mfu']['causal']:>12.1%}{row['mfu']['full']:>10.1%}{row['times_as_fast_as'][BASELINE]:>8.2f}"
              f"{row['load_violation']:>8.2f}"
              + ("" if on_gpu else f"{row['times_as_fast_as'][recipes[0]]:>11.2f}"), flush=True)
    return {"config": name, "fields": config.to_dict(), "parameters": count, "tokens": tokens, "peak_flops": peak,
            "flops_per_token": flops, "rows": rows}


def main() -> None:
    if _JSON.value is not None:
        path = Path(_JSON.value)
        if path.is_dir() or not (path.absolute().parent.is_dir() and os.access(path.absolute().parent, os.W_OK)):
            raise RequestError(f"--json={_JSON.value!r} is not a file that can be written")
    chosen = _CONFIG.value and experiment.change(experiment.load(_CONFIG.value), _FIELDS.value)

    import jax

    from kernels.choice import gpu_refusal
    from research import environment
    from research.files import write_whole

    on_gpu = gpu_refusal() is None
    if not chosen:
        fields = (*(ON_GPU_FIELDS if on_gpu else ()), *_FIELDS.value)
        chosen = experiment.change(experiment.load(ON_GPU if on_gpu else ON_CPU), fields)
    result = {"environment": environment.describe()}
    about = result["environment"]
    print(f"{about['device']}, jax {jax.__version__}, commit {about['commit']}", flush=True)
    for part in PARTS if _PART.value is None else (_PART.value,):
        result[part] = (measure_layer(on_gpu) if part == "layer" else
                        measure_step(on_gpu, chosen, _CONFIG.value or (ON_GPU if on_gpu else ON_CPU)))
        if _JSON.value is not None:
            write_whole(Path(_JSON.value), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    command.run(main, FLAGS)
