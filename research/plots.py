"""Pictures in one look, read in black and white: shades, hatches, marks and lines tell series apart, not colours."""

import importlib.util
from pathlib import Path

from research.errors import RequestError

STYLE = {
    "figure.constrained_layout.use": True, "savefig.dpi": 110, "font.size": 9, "axes.titlesize": 10,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "0.85", "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "hatch.linewidth": 0.6,
}
BARS = ({"color": "white", "hatch": "////"}, {"color": "0.35"}, {"color": "0.75"}, {"color": "white", "hatch": "...."})
LINES = ({"marker": "o", "linestyle": "-"}, {"marker": "s", "linestyle": "--"}, {"marker": "^", "linestyle": ":"},
         {"marker": "D", "linestyle": "-."})


def require(asked: str) -> None:
    """Raises RequestError where matplotlib is missing: runs do without it, `make setup` installs it."""
    if not importlib.util.find_spec("matplotlib"):
        raise RequestError(f"{asked} draws with matplotlib: pip install -r requirements-dev.txt")


def save(path: Path, draw, panels: int = 1, height: float = 3.2) -> None:
    """Writes a PNG of `panels` axes below one another, which `draw` fills; height: inches of each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(panels, figsize=(7, height * panels), squeeze=False)
        draw(list(axes[:, 0]))
        figure.savefig(path, format="png", metadata={"Software": None})
        pyplot.close(figure)


def bars(axes, labels: list[str], series: dict[str, list[float | None]], quantity: str, digits: int,
         log: bool = False) -> None:
    """Horizontal bars of each label, a series beside another, with their numbers; None leaves a gap.

    quantity: the axis's label, with its unit.
    """
    from matplotlib.patches import Patch

    thick = 0.8 / len(series)
    shown = [value for values in series.values() for value in values if value is not None]
    for number, values in enumerate(series.values()):
        for place, value in enumerate(values):
            if value is None:
                continue
            at = place + (number - (len(series) - 1) / 2) * thick
            axes.barh(at, value, thick, edgecolor="black", linewidth=0.7, **BARS[number])
            axes.annotate(f"{value:,.{digits}f}", (value, at), (3, 0), textcoords="offset points", va="center",
                          fontsize=8 if len(labels) <= 6 else 7)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    if log:
        axes.set_xscale("log")
        axes.set_xlim(min(shown) / 2, max(shown) * 4)
    else:
        axes.set_xlim(0, max(shown) * 1.18)
    axes.set_xlabel(quantity)
    axes.legend(handles=[Patch(edgecolor="black", facecolor=look["color"], hatch=look.get("hatch"), label=name)
                         for name, look in zip(series, BARS, strict=False)],
                loc="lower left", bbox_to_anchor=(0, 1), ncols=len(series))
