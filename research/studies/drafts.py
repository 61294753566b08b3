"""Drafts and what became of them: the text with its accepted tokens, rates by position and temperature, speed."""

import html
import statistics
import time
from pathlib import Path

from research import plots
from research.bench_acceptance import load
from research.decoding.generate import Decoder, Generation, joined
from research.decoding.sampling import Sampling
from research.training.samples import starts_of


class Drafting:
    """A trained run with multi-token modules, and held-out starts to continue."""

    def __init__(self, workdir: str, prompts: int, prompt: int):
        self.model, variables, self.corpus, self.settings = load(Path(workdir))
        self.decoder = Decoder(self.model, variables)
        _, self.prompts = starts_of(self.corpus, prompts, prompt)

    def continued(self, temperature: float, drafts: int, new: int, seed: int = 0) -> Generation:
        """All prompts, one after another: speeds and rates of a text that one reader waits for."""
        return joined([self.decoder.generate([prompt], new, Sampling(temperature), drafts, seed + number)
                       for number, prompt in enumerate(self.prompts)])

    def steps(self, place: int, drafts: int, new: int, temperature: float = 0.0) -> list[list[int]]:
        """The tokens that each pass of the main model gave: one, and one more for each draft that stood."""
        seen = []

        def watch(rows):
            seen.append(list(rows[0]))
            return [False]

        self.decoder.generate([self.prompts[place]], new, Sampling(temperature), drafts, steps_at_once=1, watch=watch)
        passes = [seen[0]] + [after[len(before):] for before, after in zip(seen, seen[1:], strict=False)]
        return [tokens for tokens in passes if tokens]

    def in_colour(self, place: int, steps: list[list[int]]) -> str:
        """HTML: the prompt in grey, drafted tokens that stood dark on light and framed, the others plain."""
        spans = [f'<span style="color:#777">{_shown(self.corpus.tokenizer.decode(self.prompts[place][1:]))}</span>']
        for tokens in steps:
            for number, token in enumerate(tokens):
                drafted = number < len(tokens) - 1
                style = "background:#bfe3c0;border-bottom:2px solid #2c6b2f" if drafted else ""
                spans.append(f'<span style="{style}">{_shown(self.corpus.tokenizer.decode([token]))}</span>')
        return ('<pre style="white-space:pre-wrap;line-height:1.6;background:#fff;color:#000;padding:6px">'
                + "".join(spans) + "</pre>")

    def rates(self, temperatures: list[float], drafts: int, new: int) -> dict[float, list[float]]:
        """{temperature: share of steps in which the draft at each position, and all before it, stood}."""
        return {t: self.continued(t, drafts, new).acceptance_rate for t in temperatures}

    def speeds(self, most: int, new: int, rounds: int) -> dict[int, list[float]]:
        """{drafts: tokens/s of each round}, greedy, in turns: none is always the one that goes first."""
        found = {k: [] for k in range(most + 1)}
        for k in found:
            self.decoder.generate(self.prompts[:1], new, draft_tokens=k)  # compiles
        for turn in range(rounds):
            for k in found if turn % 2 == 0 else reversed(found):
                start = time.perf_counter()
                made = self.continued(0.0, k, new)
                found[k].append(sum(map(len, made.tokens)) / (time.perf_counter() - start - made.compile_seconds))
        return found


def _shown(text: str) -> str:
    return html.escape(text).replace("\ufffd", "&#9633;")


def worth(rate: float, cost: float, drafts: int = 1) -> float:
    """Tokens a pass over its price: 1 + a + a^2 + ... for drafts that stand with probability a, each in its turn.

    cost: a pass that also drafts and verifies, over a plain one.
    """
    return sum(rate**position for position in range(drafts + 1)) / cost


def draw_rates(axes, found: dict[float, list[float]]) -> None:
    """Acceptance by position of the draft, a bar for each temperature."""
    positions = range(len(next(iter(found.values()))))
    plots.bars(axes, [f"draft {position + 1}" for position in positions],
               {f"temperature {t:g}": [100 * rates[position] for position in positions] for t, rates in found.items()},
               "share of passes in which it stood, and all before it (%)", 1)


def draw_speeds(axes, found: dict[int, list[float]], tokens_a_step: dict[int, float]) -> None:
    """Two panels: tokens a pass and tokens/s, median and range, by number of drafts."""
    drafts = list(found)
    plots.bars(axes[0], [f"{k} drafts" for k in drafts], {"": [tokens_a_step[k] for k in drafts]},
               "tokens a pass of the model", 2)
    axes[0].get_legend().remove()
    median = [statistics.median(found[k]) for k in drafts]
    plots.bars(axes[1], [f"{k} drafts" for k in drafts], {"": median}, "tokens a second, median and range", 0)
    axes[1].get_legend().remove()
    for place, k in enumerate(drafts):
        axes[1].set_xlim(0, 1.18 * max(map(max, found.values())))
        axes[1].hlines(place + 0.25, min(found[k]), max(found[k]), color="black", linewidth=1.5)


def draw_worth(axes, rate: float, cost: float, measured: dict[str, float]) -> None:
    """Speed over plain decoding by acceptance rate, for what a drafting pass costs; where this model and V3 stand."""
    from matplotlib.ticker import MultipleLocator, PercentFormatter

    grid = [place / 50 for place in range(51)]
    plots.lines(axes, {f"a pass costs {price:.2f} plain ones": (grid, [worth(a, price) for a in grid])
                       for price in dict.fromkeys((1.0, 1.1, 1.5, cost))},
                "acceptance rate of one draft", "times as fast as plain")
    axes.axhline(1, color="black", linewidth=0.8)
    for name, a in measured.items():
        axes.axvline(a, color="0.5", linewidth=1)
        axes.annotate(name, (a, 2.03), rotation=90, fontsize=8, ha="right", va="top")
    axes.plot([rate], [worth(rate, cost)], "k*", markersize=12)
    axes.xaxis.set_major_locator(MultipleLocator(0.2))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(min(0.5, 0.9 * worth(rate, cost)), 2.05)
