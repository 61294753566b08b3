"""DeepSeekMoE's Table 1 and §4.4-4.5: dense, few large experts, many small ones, with and without shared ones."""

from research.tables import study
from research.tables.judgement import draw
from research.tables.quantities import MASKED
from research.tables.readings import Reading
from research.tables.study import EQUAL, HIGHER, LOWER, Claim, Run, Study

__all__ = ["draw"]

TITLE = "Experts: how many, how fine, how many shared"
SOURCE = "DeepSeekMoE (2401.06066) Tables 1, 2 (Pile loss at 2B), §4.4, §4.5 and Figures 3 to 6"
NOTES = (
    "Where the paper only plots an order, only its side is judged. Figure 3 orders benchmarks' normalised scores.",
    "`fine_4_disabled` is fine_4 without its shared expert and with one more routed one, `fine_4_active_4` to `_6` are "
    "fine_4 with so many routed experts active in place of 7 (Figure 5): not trained further.",
    "Figure 4: each token's routed experts with the highest affinities, without the bias, are masked, and the gate "
    "chooses as many as before among the rest, in all layers; nothing is trained further. n/16 are n of the 16 experts "
    "of `top_2_wide`, GShard x1.5, and 4 n of fine_4's 63. The paper plots it and prints no figures.",
)
HEIGHT = 4.2
NATS = "validation loss"
FINE, WIDE, HALF, DISABLED = "fine_4", "top_2_wide", "half", "fine_4_disabled"
FEWER = ("fine_4_active_4", "fine_4_active_5", "fine_4_active_6")
RISES = tuple(f"rise of the loss, best {n}/16 masked" for n in MASKED)
STUDY = Study(
    "experts",
    ("dense", "top_1", "top_2", WIDE, "shared", "fine_2", FINE, "fine_4_unshared", "shared_2", "shared_4", HALF,
     DISABLED, *FEWER),
    (NATS, *RISES),
    (Claim(NATS, "top_1", "dense", -0.179, "2.060 to 1.881"), Claim(NATS, "top_2", "top_1", -0.014, "1.881 to 1.867"),
     Claim(NATS, FINE, "top_2", -0.059, "1.867 to 1.808"),
     Claim(NATS, FINE, WIDE, 0.0, "Table 2: both 1.808"),
     Claim(NATS, "shared", "top_2", LOWER, "Figure 3, an order"), Claim(NATS, "fine_2", "shared", LOWER, "Figure 3"),
     Claim(NATS, FINE, "fine_2", LOWER, "Figure 3"),
     Claim(NATS, "fine_4_unshared", FINE, None, "no figure in the paper"),
     Claim(NATS, "shared_2", FINE, -0.002, "1.808 to 1.806"), Claim(NATS, "shared_4", FINE, 0.003, "1.808 to 1.811"),
     Claim(NATS, HALF, "top_2", LOWER, "Figure 6, an order"),
     Claim(NATS, DISABLED, FINE, 0.606, "§4.5: 1.808 to 2.414"),
     Claim(NATS, FEWER[0], FINE, HIGHER, "Figure 5: from 1.808 up to GShard's loss"),
     Claim(NATS, FEWER[0], "top_2", EQUAL, "Figure 5: GShard's loss is reached"),
     *(Claim(quantity, FINE, WIDE, HIGHER, "Figure 4, an order") for quantity in RISES)),
    {(NATS, "dense"): 2.060, (NATS, "top_1"): 1.881, (NATS, "top_2"): 1.867, (NATS, WIDE): 1.808, (NATS, FINE): 1.808,
     (NATS, "shared_2"): 1.806, (NATS, "shared_4"): 1.811, (NATS, DISABLED): 2.414},
    starts=dict.fromkeys((DISABLED, *FEWER), FINE), untrained=(DISABLED, *FEWER))


def without_best(masked: int):
    """For `nn.intercept_methods`: gates that choose, and weigh, among what is left of the experts of a token when the
    `masked` ones with its highest affinities are gone."""
    import jax
    import jax.numpy as jnp

    from research.model.moe import Gate, choose_experts, gate_weights

    def gate(call, args, kwargs, context):
        found, module = call(*args, **kwargs), context.module
        if not isinstance(module, Gate):
            return found
        affinity_XE, c = found[0], module.config
        best_X = jax.lax.top_k(affinity_XE, masked)[1]
        gone_XE = jnp.any(jax.nn.one_hot(best_X, c.n_routed_experts, dtype=bool), axis=1)
        indices_XK = choose_experts(jnp.where(gone_XE, -jnp.inf, affinity_XE),
                                    module.get_variable("routing", "e_score_correction_bias"), c)
        return affinity_XE, indices_XK, gate_weights(affinity_XE, indices_XK, c)

    return gate


def read(run: Run) -> dict:
    """`loss`: nats a target of all held-out text, by the sixteenths of the routed experts that are masked; {} for the
    arms that Figure 4 does not show."""
    if run.arm not in (FINE, WIDE):
        return {"loss": {}}
    import flax.linen as nn

    from research.training.evaluation import evaluate
    from research.training.step import make_eval_step

    settings, model, variables, corpus = study.weights_of(run)

    def loss(sixteenths: int) -> float:
        with nn.intercept_methods(without_best(round(sixteenths * settings.model.n_routed_experts / 16))):
            return evaluate(make_eval_step(model, settings), variables | {"ema": None}, corpus, settings)["loss"]

    return {"loss": {n: loss(n) for n in MASKED}}


KIND = Reading("masked", read)
