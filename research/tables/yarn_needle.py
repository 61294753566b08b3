"""DeepSeek-V3's Figure 8 in small: needles in contexts of up to four times the length that a model was trained at."""

import numpy as np

from experiments.yarn import STARTS
from research import plots
from research.data.needles import VALUES, Needles
from research.data.packing import Stream
from research.tables import study
from research.tables.readings import Reading
from research.tables.study import EQUAL, HIGHER, Claim, Run, Study

TITLE = "Needles in contexts of up to four trained lengths"
SOURCE = "DeepSeek-V3 (2412.19437) §4.3 and Figure 8: 4K to 32K to 128K; YaRN (2309.00071)"
NOTES = (
    "`base` is trained on rows of T tokens; `half` and `extended` go on from it with YaRN on rows of 2 T, then 4 T; "
    "`plain_half` and `plain` do the same without YaRN; `untrained` is base's weights under YaRN. T is 64 at micro, "
    "128 at mini.",
    "Figure 8 shows V3 after instruction tuning finding its needles at all depths up to 128K, and no other model: only "
    "its directions are judged here, one of them that nothing is lost. That plain models fail beyond their length is "
    "YaRN's premise.",
    "Ours is the needle: `# key a B` in held-out source text, whose key the end names; it is found if the likeliest "
    f"token is the right one of {len(VALUES)} letters. Every training row is text hiding up to ten; their values are "
    "its only targets: such a model does not continue text. Each phase has rows of its own length, so base has seen no "
    "needle further away than T, extended up to 4 T.",
)
TIMES = (1, 2, 3, 4)  # trained lengths
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
CONTEXTS, AT_ONCE = 64, 16  # of each length and depth
BASE, UNTRAINED, EXTENDED, PLAIN = "base", "untrained", "extended", "plain"
SHOWN = {BASE: "as trained", UNTRAINED: "YaRN, untrained", PLAIN: "trained, no YaRN", EXTENDED: "YaRN, trained"}
ONCE, FOUR = "found at 1 T, %", "found at 4 T, %"
STUDY = Study(
    "yarn", (BASE, UNTRAINED, "half", EXTENDED, "plain_half", PLAIN), tuple(f"found at {n} T, %" for n in TIMES),
    (Claim(FOUR, EXTENDED, BASE, HIGHER, "Figure 8 and YaRN's premise, an order"),
     Claim(FOUR, EXTENDED, UNTRAINED, None, "no figure in the paper"),
     Claim(FOUR, EXTENDED, PLAIN, None, "no figure in the paper"),
     Claim(FOUR, EXTENDED, "half", None, "no figure in the paper"),
     Claim(FOUR, UNTRAINED, BASE, None, "no figure in the paper"),
     Claim(ONCE, EXTENDED, BASE, EQUAL, "Figure 8: nothing is lost")),
    starts=STARTS, untrained=(UNTRAINED,))


def read(run: Run) -> dict:
    """`found`: shares of the needles, {times T: [by depth]}."""
    import jax
    import jax.numpy as jnp

    from research.decoding.sampling import likeliest
    from research.training.step import apply_model

    settings, model, variables, corpus = study.weights_of(run)
    T = [run, *study.starts_of(run)][-1].settings.data.sequence_length
    needles = Needles(corpus.tokenizer, settings.data, settings.training.seed)

    @jax.jit
    def right(batch):
        logits_BTV, _ = apply_model(model, settings, variables["params"], variables["routing"], batch)
        return jnp.all((likeliest(logits_BTV) == batch["targets_BT"]) | ~batch["mask_BT"], axis=1)

    def found(stream: Stream, depth: float) -> float:
        numbers = np.arange(CONTEXTS)
        rows = numbers * (stream.rows - 1) // CONTEXTS  # without the last, which ends with padding
        return float(np.mean([right(needles.ask(stream.batch(rows[part]), part, depth))
                              for part in numbers.reshape(-1, AT_ONCE)]))

    shares = {}
    for times in TIMES:
        stream = Stream(corpus.validation, corpus.tokenizer, sequence_length=times * T, mask_documents=False,
                        shuffle=False)
        shares[times] = [found(stream, depth) for depth in DEPTHS]
    return {"found": shares}


KIND = Reading("needles", read)


def draw(axes, rows: list) -> None:
    """What is found by context and depth, mean of the seeds, of the largest size."""
    size = rows[-1].what.split(": ")[0]
    axes.set_axis_off()
    for place, (arm, name) in enumerate(SHOWN.items()):
        shares = [row.parts for n in TIMES for row in rows
                  if (row.what, row.unit) == (f"{size}: {arm}", f"found at {n} T, %") and row.parts]
        if not shares:  # it diverged in every seed
            continue
        panel = axes.inset_axes((place / len(SHOWN), 0.12, 0.9 / len(SHOWN), 0.82))
        plots.ink(panel, np.transpose(shares).tolist(), [f"{depth:.0%}" if not place else "" for depth in DEPTHS],
                  [f"{n} T" for n in TIMES], "" if place else "depth", "context", "", 100, 0)
        panel.set_title(name)
    axes.text(0, -0.08, f"{size}: % of needles found, mean of the seeds", transform=axes.transAxes)
