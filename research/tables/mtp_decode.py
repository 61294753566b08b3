"""DeepSeek-V3's §5.4.3: how often the multi-token modules' drafts stand, and what decoding gains by them."""

import contextlib
import sys

from research import plots
from research.tables.quantities import TEMPERATURES
from research.tables.readings import Reading
from research.tables.study import Claim, Run, Study

TITLE = "Decoding with multi-token drafts"
SOURCE = "DeepSeek-V3 (2412.19437) §5.4.3: 85 to 90% of second tokens accepted, 1.8 times the tokens a second"
NOTES = (
    "The models are those of v3_mtp, and depth_1 trained for two and four times the steps. The paper names no "
    "temperature and has one module, whose speed stands at both temperatures; its acceptance is of a model of 671B in "
    "conversation, ours of source text.",
    "Each held-out start alone, greedy or sampled. With one module the second draft is the module's on its own output. "
    "A draft stands where it and all before it are accepted; tokens a step count the whole loop.",
    "Speeds are medians of rounds in turn with plain decoding on a shared machine; on a CPU a pass over more tokens "
    "takes longer, where a large model's waits for its weights.",
)
ONE, TWO, LONGER = "depth_1", "depth_2", ("longer_2", "longer_4")
PROMPTS, ROUNDS = 8, 3
STANDS = tuple(f"draft {position} stands at temperature {t:g}, %" for t in TEMPERATURES for position in (1, 2))
STEPS, SPEEDS = (tuple(f"{name}, {k} drafted, temperature {t:g}" for t in TEMPERATURES for k in (1, 2))
                 for name in ("tokens a step", "times plain speed"))
STUDY = Study(
    "mtp", (ONE, TWO, *LONGER), (*STANDS, *STEPS, *SPEEDS),
    tuple(Claim(quantity, TWO, ONE, None, "no figure in the paper") for quantity in (*STANDS, *STEPS[1::2]))
    + tuple(Claim(quantity, arm, ONE, None, "no figure in the paper") for quantity in (*STANDS[::2], *STEPS[::2])
            for arm in LONGER),
    {(quantity, ONE): 1.8 for quantity in SPEEDS[::2]})


def read(run: Run) -> dict:
    """What research.bench_decoding --part=acceptance measures of its workdir; its lines go to stderr."""
    from research.bench_acceptance import Request, measure_acceptance

    quarter = run.settings.data.sequence_length // 4
    with contextlib.redirect_stdout(sys.stderr):
        return measure_acceptance(Request(run.workdir, PROMPTS, quarter, 2 * quarter, 2, TEMPERATURES, ROUNDS))


KIND = Reading("drafting", read)


def draw(axes, rows: list) -> None:
    """How often drafts stand, of the largest size."""
    size = rows[-1].what.split(": ")[0]
    shown = {(row.what, row.unit): row.ours for row in rows if not row.verdict}
    plots.bars(axes, list(STANDS), {arm: [shown.get((f"{size}: {arm}", unit)) for unit in STANDS]
                                    for arm in STUDY.arms}, f"% of steps, mean of the seeds, {size}", 0)
