"""DeepSeek-V3's Figure 9: which experts a domain of text loads, balanced by a bias or by a loss."""

import dataclasses
from collections import defaultdict
from pathlib import Path

import numpy as np

from research import plots
from research.data.packing import Tokens
from research.data.sources import utf8_bytes
from research.errors import RunError
from research.tables import study
from research.tables.readings import Reading
from research.tables.study import HIGHER, Claim, Run, Study

TITLE = "Experts' load by domain of text"
SOURCE = "DeepSeek-V3 (2412.19437) §4.5.3, Figure 9: relative load on the Pile's domains at 15.7B, two layers"
NOTES = (
    "The paper shows loads and says that loss-free experts specialise more: an order. The figure of ours: the "
    "share of a domain's load that lies on other experts than that of all held-out text, mean of layers and domains.",
    "A domain is a package of the standard library, or a module of none, among the held-out files: the one the text is "
    "from says little of what it is about. The models are those of v3_balance.",
    "The picture is of the first seed's last layer, relative load (1 is even) by domain and expert.",
)
FREE, BOTH, LOSS = "bias_alone", "bias", "sequence_loss"
MOVED = "load that domains move, %"
STUDY = Study("balance", (FREE, BOTH, LOSS), (MOVED,), (
    Claim(MOVED, FREE, LOSS, HIGHER, "Figure 9, an order"), Claim(MOVED, BOTH, LOSS, None, "no figure in the paper")))
LEAST = 1500  # tokens of a domain


def domains(corpus) -> dict[str, list[int]]:
    """{package, or module of none: places of its held-out documents}, those of LEAST tokens or more."""
    found = defaultdict(list)
    for place, document in enumerate(corpus.validation_documents):
        first, *others = Path(document.name).parts
        found[first if others else Path(first).stem].append(place)
    lengths = np.diff(corpus.validation.offsets)
    return {name: places for name, places in found.items() if lengths[places].sum() >= LEAST}


def part_of(corpus, places: list[int]):
    """The corpus with only these of its held-out documents."""
    v, documents = corpus.validation, [corpus.validation_documents[place] for place in places]
    pieces = [v.flat[v.offsets[place]:v.offsets[place + 1]] for place in places]
    tokens = Tokens(np.concatenate(pieces), np.cumsum([0, *map(len, pieces)]))
    return dataclasses.replace(corpus, validation=tokens, validation_documents=documents,
                               validation_bytes=utf8_bytes(documents))


def read(run: Run) -> dict:
    """Relative loads of every layer's experts, (L, E), of `all` held-out text and of each of its `domains`."""
    from research.training.evaluation import evaluate
    from research.training.step import make_eval_step

    settings, model, variables, corpus = study.weights_of(run)
    step = make_eval_step(model, settings)

    def loads(part) -> list[list[float]]:
        return evaluate(step, variables | {"ema": None}, part, settings)["expert_load"]

    parts = domains(corpus)
    if len(parts) < 2:
        raise RunError(f"{run}: the held-out text has {len(parts)} domains of {LEAST} tokens, which takes two")
    return {"all": loads(corpus), "domains": {name: loads(part_of(corpus, places)) for name, places in parts.items()}}


KIND = Reading("domains", read)


def draw(axes, rows: list) -> None:
    """Relative load by domain and expert, loss-free beside the loss, of the largest size."""
    size = rows[-1].what.split(": ")[0]
    loads = {arm: row.parts for arm in (FREE, LOSS) for row in rows if row.what == f"{size}: {arm}" and row.parts}
    largest = max((load for of_arm in loads.values() for load in np.ravel(list(of_arm.values()))), default=1.0)
    axes.set_axis_off()
    for place, (arm, of_arm) in enumerate(loads.items()):
        panel = axes.inset_axes((place / 2, 0.12, 0.46, 0.82))
        plots.ink(panel, list(of_arm.values()), ["" if place else name for name in of_arm],
                  [str(expert) for expert in range(len(next(iter(of_arm.values()))))], "", "expert", "", largest)
        panel.set_title(f"{size}: {arm}")
    axes.text(0, -0.08, f"load / mean of the domain, from 0 (white) to {largest:.1f} (black)", transform=axes.transAxes)
