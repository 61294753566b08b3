"""Pictures in one look, read in black and white: shades, hatches, marks and lines tell series apart, not colours."""

import html
import importlib.util
import io
import itertools
import re
from pathlib import Path

from research.errors import RequestError

STYLE = {
    "figure.constrained_layout.use": True, "savefig.dpi": 110, "font.size": 9, "axes.titlesize": 10,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "0.85", "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "hatch.linewidth": 0.6,
}
BARS = ({"color": "white", "hatch": "////"}, {"color": "0.35"}, {"color": "0.75"}, {"color": "white", "hatch": "...."})
LINES = ({"marker": "o", "linestyle": "-"}, {"marker": "s", "linestyle": "--"}, {"marker": "^", "linestyle": ":"},
         {"marker": "D", "linestyle": "-."}, {"marker": "v", "linestyle": "-"}, {"marker": "P", "linestyle": "--"},
         {"marker": "*", "linestyle": ":"}, {"marker": "X", "linestyle": "-."})
HEIGHT = 3.2  # inches of one axes


def require(asked: str) -> None:
    """Raises RequestError where matplotlib is missing: runs do without it, `make setup` installs it."""
    if not importlib.util.find_spec("matplotlib"):
        raise RequestError(f"{asked} draws with matplotlib: pip install -r requirements-dev.txt")


def save(path: Path, draw, panels: int = 1, height: float = HEIGHT) -> None:
    """Writes a PNG of `panels` axes below one another, which `draw` fills; height: inches of each."""
    path.write_bytes(png(draw, panels, height))


def png(draw, panels: int = 1, height: float = HEIGHT) -> bytes:
    """What `save` writes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(panels, figsize=(7, height * panels), squeeze=False)
        draw(list(axes[:, 0]))
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
        pyplot.close(figure)
    return file.getvalue()


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
        axes.set_xlim(0, max(shown, default=0) * 1.18 or 1)
    axes.set_xlabel(quantity)
    axes.legend(handles=[Patch(edgecolor="black", facecolor=look["color"], hatch=look.get("hatch"), label=name)
                         for name, look in zip(series, BARS, strict=False)],
                loc="lower left", bbox_to_anchor=(0, 1), ncols=len(series))


def ranges(axes, labels: list[str], series: dict[str, list[tuple | None]], quantity: str) -> None:
    """Horizontal ranges (middle, low, high) of each label around a line at 0, a series beside another.

    quantity: the axis's label, with its unit.
    """
    apart = 0.6 / len(series)
    for number, ((name, points), look) in enumerate(zip(series.items(), itertools.cycle(LINES))):
        shown = [(place, *point) for place, point in enumerate(points) if point is not None]
        place, middle, low, high = zip(*shown, strict=True)
        at = [y + (number - (len(series) - 1) / 2) * apart for y in place]
        axes.hlines(at, low, high, color="black", linewidth=1.1)
        axes.plot(middle, at, color="black", linestyle="none", marker=look["marker"], markerfacecolor="white",
                  label=name)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.set_xlabel(quantity)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(series))


def timeline(axes, groups: dict[str, list[list[tuple]]], row: str, across: str) -> None:
    """Who does what when: rows of (start, end, parts), where a part is what is done, by a look, and a word on it.

    groups: {name: rows}, one below another; parts of one time stand above one another. row, across: what a row is, and
    the label of the time with its unit.
    """
    from matplotlib.patches import Patch

    kinds = list(dict.fromkeys(kind for rows in groups.values() for cells in rows for *_, parts in cells
                               for kind, _ in parts))
    looks = dict(zip(kinds, ({"color": "white"}, {"color": "0.62"}, {"color": "0.85"},
                             {"color": "white", "hatch": "//////"}), strict=False))
    top, places, names = 0, [], []
    for name, rows in groups.items():
        axes.annotate(name, (0, top), (0, 2), textcoords="offset points", fontsize=8.5)
        for number, cells in enumerate(rows):
            for start, end, parts in cells:
                for part, (kind, word) in enumerate(parts):
                    at = top + number + (part + 0.5) / len(parts)
                    axes.barh(at, end - start, 1 / len(parts), left=start, edgecolor="black", linewidth=0.4,
                              **looks[kind])
                    axes.annotate(word, ((start + end) / 2, at), ha="center", va="center_baseline",
                                  fontsize=6.5 if len(parts) == 1 else 5,
                                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3}
                                  if "hatch" in looks[kind] else None)
            places.append(top + number + 0.5)
            names.append(f"{row} {number}")
        top += len(rows) + 1.6
    axes.set_yticks(places, names, fontsize=7)
    axes.set_ylim(top - 1.2, -1.2)
    axes.set_xlim(0, max(cells[-1][1] for rows in groups.values() for cells in rows))
    axes.set_xlabel(across)
    axes.grid(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(handles=[Patch(edgecolor="black", facecolor=look["color"], hatch=look.get("hatch"), label=kind)
                         for kind, look in looks.items()],
                loc="lower left", bbox_to_anchor=(0, 1), ncols=len(looks), fontsize=7.5, columnspacing=1.2)


def svg(draw, name: str, label: str, height: float = 2.5) -> str:
    """One axes that `draw` fills, as an `<svg>` that stands in a page and takes the page's ink, paper and font.

    name: other than every other figure's of the page, whose ids would meet; label: what is read aloud in its place.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    page = {"svg.fonttype": "none", "svg.hashsalt": name, "savefig.transparent": True, "grid.color": "black",
            "grid.alpha": 0.15, "font.size": 9.5}
    file = io.StringIO()
    with matplotlib.rc_context(STYLE | page):
        figure, axes = pyplot.subplots(figsize=(4.3, height))
        draw(axes)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        pyplot.close(figure)
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg"):].replace("#000000", "currentColor").replace("#ffffff", "var(--paper)")
    drawn = re.sub(r"'DejaVu Sans'.*?(?=[;\"])", "inherit", drawn)
    drawn = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", drawn)
    return drawn.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}" fill="currentColor"', 1)


def ink(axes, values_RC, rows: list[str], columns: list[str], row: str, column: str, quantity: str,
        largest: float | None = None, digits: int | None = None) -> None:
    """A table of shades, darker is more, from 0 to `largest` (None: the largest value).

    row, column, quantity: what rows, columns and shades are, "": no scale of shades; digits: the numbers stand in the
    cells too.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    # black of growing opacity, not greys: on a dark page the ink is white
    shades = LinearSegmentedColormap.from_list("ink", [(0, 0, 0, 0), (0, 0, 0, 1)])
    norm = Normalize(0, largest or max((float(value) for values in values_RC for value in values), default=1) or 1)
    axes.pcolormesh(values_RC, cmap=shades, norm=norm, edgecolors=(0, 0, 0, 0.25), linewidth=0.4)
    axes.set_xticks(*_ticks(columns))
    axes.set_yticks(*_ticks(rows))
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel(column)
    axes.set_ylabel(row)
    if digits is not None:
        for y, values in enumerate(values_RC):
            for x, value in enumerate(values):
                axes.text(x + 0.5, y + 0.5, f"{value:.{digits}f}", ha="center", va="center", fontsize=7,
                          color="#000000" if norm(value) < 0.55 else "#ffffff")
    if not quantity:
        return
    scale = axes.figure.colorbar(ScalarMappable(norm, shades), ax=axes, label=quantity, fraction=0.046, pad=0.02)
    scale.outline.set_visible(False)
    scale.solids.set_rasterized(False)


def _ticks(names: list[str]) -> tuple[list[float], list[str]]:
    """Places and names of at most 16 ticks in the middle of cells."""
    every = -(-len(names) // 16)
    return [place + 0.5 for place in range(0, len(names), every)], names[::every]


def lines(axes, series: dict[str, tuple], across: str, quantity: str) -> None:
    """A curve for each name: (x, y), or (x, y, low, high), whose range is a band.

    across, quantity: the labels of the axes, with their units.
    """
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    for (name, (x, y, *band)), look in zip(series.items(), itertools.cycle(LINES)):
        axes.plot(x, y, color="black", linewidth=1.1, markersize=4, markerfacecolor="white",
                  markevery=max(1, len(x) // 6), label=name, **look)
        if band:
            axes.fill_between(x, *band, color="black", alpha=0.18, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.7g}"))
    axes.set_xlabel(across)
    axes.set_ylabel(quantity)
    if len(series) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, fontsize=8.5,
                    handlelength=1.8, columnspacing=1.2)
