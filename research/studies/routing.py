"""Which experts take which tokens, and what keeps them evenly loaded."""

import keyword
from pathlib import Path

import jax
import numpy as np

from research import plots
from research.data.pipeline import load_corpus, validation_batches
from research.data.tokenizer import Tokenizer
from research.interop.weights import checked_weights
from research.model.balance import load_violation, relative_load, update_bias
from research.model.moe import choose_experts
from research.reporting.run import column
from research.tables.runner import Row, compared, of_unit, published
from research.training.step import apply_model

KINDS = ("keyword", "name", "number", "operator", "bracket", "quote", "space", "other")


class Routed:
    """Held-out tokens of a run, and for each expert layer the affinities and experts that its router gave them."""

    def __init__(self, workdir: str, batches: int = 2):
        settings, model, variables = checked_weights(Path(workdir))
        self.config = settings.model
        corpus = load_corpus(settings, Tokenizer.load(Path(workdir)))
        self.tokenizer = corpus.tokenizer
        run = jax.jit(lambda batch: apply_model(
            model, settings, variables["params"], variables["routing"], batch)[1]["routing"]["layers"])
        tokens, indices, affinities = [], [], []
        for batch in validation_batches(corpus, settings, batches):
            found, real_BT = jax.tree.map(np.asarray, run(batch)), np.asarray(batch["segments_BT"]) > 0
            tokens.append(np.asarray(batch["tokens_BT"])[real_BT])
            indices.append(found["indices"][:, real_BT])
            affinities.append(found["affinity"][:, real_BT])
        self.tokens_X = np.concatenate(tokens)
        self.indices_LXK = np.concatenate(indices, axis=1)
        self.affinity_LXE = np.concatenate(affinities, axis=1)

    def text(self, start: int, number: int) -> list[str]:
        """Single tokens as text."""
        return [self.tokenizer.decode([int(token)]) for token in self.tokens_X[start:start + number]]

    def by_kind(self, layer: int) -> tuple[list[str], np.ndarray]:
        """(kinds of tokens, each one's relative load of every expert): 1 is what chance would give."""
        kinds = [kind_of(text) for text in self.text(0, len(self.tokens_X))]
        rows = []
        for kind in KINDS:
            chosen = self.indices_LXK[layer][[k == kind for k in kinds]]
            rows.append(np.bincount(chosen.ravel(), minlength=self.config.n_routed_experts).astype(float))
        present = [place for place, row in enumerate(rows) if row.sum()]
        return [KINDS[place] for place in present], np.array(relative_load(np.array([rows[p] for p in present])))


def kind_of(text: str) -> str:
    """The kind of a token of Python source, by its characters alone."""
    word = text.strip()
    if not word:
        return "space"
    if keyword.iskeyword(word):
        return "keyword"
    if word.replace("_", "a").isalnum():
        return "number" if word[0].isdigit() else "name"
    for kind, characters in (("bracket", "()[]{}"), ("quote", "'\"#"), ("operator", "+-*/%=<>!&|^~.,:;@")):
        if all(c in characters for c in word):
            return kind
    return "other"


def in_colour(texts: list[str], experts: list[int]) -> str:
    """The tokens as HTML, each on the shade of its expert and with the expert's number small beside it."""
    import html

    spans = []
    for text, expert in zip(texts, experts, strict=True):
        hue = 137.5 * expert % 360  # the golden angle: neighbours differ
        shown = html.escape(text).replace("\n", "&#9166;\n")
        spans.append(f'<span style="background:hsl({hue:.0f},70%,82%);color:#000" title="expert {expert}">{shown}'
                     f'<sub style="font-size:60%">{expert}</sub></span>')
    return ('<pre style="white-space:pre-wrap;line-height:1.7;background:#fff;color:#000;padding:6px">'
            + "".join(spans) + "</pre>")


def replay(affinity_XE, speed: float, steps: int = 200, batch: int = 512, seed: int = 0) -> dict:
    """Only the bias moves: the same affinities, batch after batch, and V3's update with this gamma (smoke's 4 experts).

    Starts at a bias of 0. {`violation`: MaxVio of each step's batch, `load`: relative, of the last step, `bias`}.
    """
    rng = np.random.default_rng(seed)
    E, config = affinity_XE.shape[1], published("balance:bias:smoke").model
    choose = jax.jit(lambda affinity, bias: choose_experts(affinity, bias, config))
    move = jax.jit(lambda bias, loads: (update_bias(bias, loads, config, speed), load_violation(loads)))
    bias, violations, loads = np.zeros(E, np.float32), [], np.zeros(E)
    for _ in range(steps):
        rows = rng.integers(0, len(affinity_XE), batch)
        loads = np.bincount(np.asarray(choose(affinity_XE[rows], bias)).ravel(), minlength=E).astype(np.float32)
        bias, violation = move(bias, loads)
        violations.append(float(violation))
    return {"violation": violations, "load": np.asarray(relative_load(loads)), "bias": np.asarray(bias)}


def draw_kinds(axes, found: dict[str, tuple[list[str], np.ndarray]]) -> None:
    """Which expert takes which kind of token, an axes for each run's `by_kind`, in one scale of shades."""
    largest = max(loads_KE.max() for _, loads_KE in found.values())
    for panel, (name, (kinds, loads_KE)) in zip(axes, found.items(), strict=True):
        plots.ink(panel, loads_KE.tolist(), kinds, [str(expert) for expert in range(loads_KE.shape[1])],
                  "kind of token", "expert", "load / mean of the kind", largest)
        panel.set_title(name, loc="left")


def draw_replay(axes, found: dict) -> None:
    """MaxVio over steps, and the bias that came about."""
    steps = list(range(1, len(found["violation"]) + 1))
    plots.lines(axes[0], {"": (steps, found["violation"])}, "step", "MaxVio")
    axes[0].set_ylim(0, 1.05 * max(found["violation"]))
    axes[1].bar(range(len(found["bias"])), found["bias"], color="0.5", edgecolor="black")
    axes[1].axhline(0, color="black", linewidth=0.8)
    axes[1].set_xlabel("expert")
    axes[1].set_ylabel("bias at the end")


def smooth(values: list[float], size: int = 10) -> list[float]:
    """Means of so many values up to each."""
    return [float(np.mean(values[max(0, place + 1 - size):place + 1])) for place in range(len(values))]


def draw_runs(axes, runs: dict[str, list[dict]]) -> None:
    """Of each run by step: MaxVio of its batches, means of ten steps, and its loss on held-out text."""
    for panel, (split, name, quantity, width) in zip(axes, (
            ("train", "load_violation", "MaxVio, mean of layers", 10),
            ("validation", "loss", "nats a token, held out", 1)), strict=True):
        series = {}
        for run, lines in runs.items():
            steps, values = column([line for line in lines if line["split"] == split], name)
            series[run] = steps, smooth(values, width)
        plots.lines(panel, series, "step", quantity)
    axes[0].set_ylim(0)


def draw_figures(axes, rows: list[Row], unit: str) -> None:
    """Bars of what one quantity is in each arm of a table of results/, the paper's beside ours."""
    chosen = compared([row for row in of_unit(rows, unit) if not row.verdict])
    plots.bars(axes, chosen["labels"], chosen["series"], unit, chosen["digits"])


def said(rows: list[Row], unit: str) -> str:
    """The verdicts of a table on the differences of one quantity, a line each."""
    return "\n".join(f"{row.what:<46}{row.cells()[1]:<30}{row.verdict}" for row in of_unit(rows, unit) if row.verdict)
