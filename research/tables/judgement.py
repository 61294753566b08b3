"""What a table of trained models says: figures of its arms, the differences the paper speaks of, and their verdicts.

Losses of models of other sizes on other text are no figures to compare, so verdicts are on the paper's directions: the
differences between two arms, of one seed each. What diverged has no figure: see `verdict`.
"""

import math
import statistics
from collections.abc import Iterable, Mapping

from research import plots
from research.tables.quantities import QUANTITIES, Pictured
from research.tables.runner import Row
from research.tables.study import Study
from research.training.metrics import DIVERGED

CONFIDENCE = 0.95
REPRODUCED, NOT, NOISE = "reproduced", "not reproduced", "within noise"
ONE = "one seed, no verdict"


def rows(study: Study, found: dict) -> list[Row]:
    """Each arm's figures, then each claim's differences with its verdict, size by size."""
    sizes, table = list(dict.fromkeys(size for size, _, _ in found)), []
    for size in sizes:
        for quantity in study.quantities:
            for arm in (arm for arm in study.arms if (size, quantity, arm) in found):
                figures = found[size, quantity, arm]
                table.append(Row(f"{size}: {arm}", quantity, study.paper.get((quantity, arm)),
                                 **_spread(figures.values(), quantity), how=_seeds(figures)))
        for claim in study.claims:
            ours, theirs = (found[size, claim.quantity, arm] for arm in (claim.arm, claim.than))
            lost = _lost(claim.arm, ours) + _lost(claim.than, theirs)
            paired = [ours[seed] - theirs[seed] for seed in ours]
            printed = claim.paper if claim.paper is None or math.isfinite(claim.paper) else None
            table.append(Row(f"{size}: {claim.arm} less {claim.than}", claim.quantity, printed,
                             **_spread(paired, claim.quantity), verdict=verdict(paired, claim.paper),
                             how=f"{claim.where}; {margin(paired)}{lost}"))
    return table


def verdict(paired: list[float], paper: float | None) -> str:
    """Whether the differences of the seeds have the paper's direction, by a paired t-test at 95%.

    The interval holds 0: within noise. Beyond it on the paper's side: reproduced. On the other side, or on any where
    the paper has both equal (0 or EQUAL): not reproduced. Where the paper says nothing: higher or lower. One seed has
    no interval. Where one arm's loss is infinite in every seed and the other's in none, that is the difference; else
    `diverged`.
    """
    if len(paired) < 2:
        return ONE
    if not all(map(math.isfinite, paired)):
        if not any(set(paired) == {side} for side in (math.inf, -math.inf)):
            return DIVERGED
        return _judged(paired[0], paper)
    mean, half = statistics.fmean(paired), half_width(paired)
    if abs(mean) <= half:
        return NOISE
    return _judged(mean, paper)


def _judged(difference: float, paper: float | None) -> str:
    """Of one that is beyond noise."""
    if paper is None:
        return "higher" if difference > 0 else "lower"
    return REPRODUCED if difference * paper > 0 else NOT


def half_width(paired: list[float]) -> float:
    """Of the interval of the mean of so many differences, by Student's t."""
    from scipy import stats

    n = len(paired)
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * statistics.stdev(paired) / n ** 0.5


def margin(paired: list[float]) -> str:
    paired = list(filter(math.isfinite, paired))
    if len(paired) < 2:
        return "one pair" if paired else "no pair"
    return f"ours ± {half_width(paired):.2g} (paired t, 95%)"


def _spread(values: Iterable[float], quantity: str) -> dict:
    """Mean and range of those that are numbers, and the quantity's decimals, as fields of a Row."""
    values = list(filter(math.isfinite, values))
    if not values:
        return {"ours": None, "digits": QUANTITIES[quantity][1]}
    return {"ours": statistics.fmean(values), "digits": QUANTITIES[quantity][1], "parts": _parts(values),
            "least": float(min(values)), "greatest": float(max(values))}


def _parts(values: list):
    """Those of figures that are pictured: means over seeds, place by place, or the first seed's."""
    if not isinstance(values[0], Pictured):
        return None
    if not values[0].alike:
        return values[0].parts
    return [statistics.fmean(of_seeds) for of_seeds in zip(*(value.parts for value in values), strict=True)]


def _seeds(figures: Mapping[int, float]) -> str:
    ended = sum(map(math.isfinite, figures.values()))
    return ("no seed" if not ended else f"mean of {ended} seeds" if ended > 1 else "one seed") + _lost("it", figures)


def _lost(arm: str, figures: Mapping[int, float]) -> str:
    """Which seeds of an arm diverged, as the end of a sentence; nothing where none did."""
    seeds = [str(seed) for seed, figure in figures.items() if not math.isfinite(figure)]
    return f"; {arm} diverged in seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}" if seeds else ""


def draw(axes, table: list[Row]) -> None:
    """The differences of the table's first claims' quantity, with their ranges over seeds, by size."""
    claims = [row for row in table if row.verdict and row.ours is not None]
    if not claims:  # every seed of every claim diverged
        return
    chosen = [row for row in claims if row.unit == claims[0].unit]
    labels = list(dict.fromkeys(row.what.split(": ", 1)[1] for row in chosen))
    series: dict = {}
    for row in chosen:
        size, label = row.what.split(": ", 1)
        series.setdefault(size, dict.fromkeys(labels))[label] = (row.ours, row.least, row.greatest)
    plots.ranges(axes, labels, {size: list(points.values()) for size, points in series.items()},
                 f"difference of {claims[0].unit}: mean and range over seeds")
