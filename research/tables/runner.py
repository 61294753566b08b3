"""A paper's table beside ours: its rows, and the three files that show them.

A table is a module of this package with TITLE, SOURCE (paper and table), `draw(axes, rows)`, the picture of one scale's
rows, and SCALES ({scale: function that gives its Rows}) or STUDY (trained models, see study.py) with KIND, the module
that trains them, where that is not study.py. NOTES, where it has them, say what the sources leave open or get wrong;
HEIGHT, in inches, where the picture is not as high as others.
`results/NAME.json` holds the rows of every scale that was made, by scale, so that a run at one scale leaves the others
as they stand; the Markdown and the picture show all of them.
"""

import importlib
import json
import pkgutil
from dataclasses import asdict, dataclass
from pathlib import Path

from research import plots, tables
from research.accounting.request import settings_of
from research.environment import describe
from research.errors import RequestError
from research.files import write_whole

ROOT = Path(__file__).resolve().parents[2]
INFRASTRUCTURE = ("__main__", "judgement", "pipelines", "quantities", "readings", "runner", "study")
SCALES = ("analytic", "cpu", "gpu")


@dataclass(frozen=True)
class Row:
    """One figure: the paper's, as it is printed with `digits` decimals, and ours; None where one of them is missing.

    Of trained models ours is a mean with its range over seeds; such a model is not the paper's, so that not the figures
    are compared but a verdict says whether a difference between two of them has the paper's direction. So has a bound.
    """

    what: str
    unit: str
    paper: float | None
    ours: float | None
    digits: int = 0
    how: str = ""  # how ours comes about
    least: float | None = None
    greatest: float | None = None
    verdict: str = ""
    parts: list | dict | None = None  # what ours is a mean of, for the picture alone

    def cells(self) -> list[str]:
        """The paper's figure and ours as the page shows them."""
        shown = ["" if x is None else f"{x:,.{self.digits}f}" for x in (self.paper, self.ours)]
        if self.least is not None and self.least != self.greatest:
            shown[1] += f" ({self.least:,.{self.digits}f} to {self.greatest:,.{self.digits}f})"
        return shown

    def to_json(self) -> dict:
        """Its fields, without those of trained models where it has none, and the difference."""
        absent = {name for name in ("least", "greatest", "verdict", "parts") if getattr(self, name) in (None, "")}
        return {name: value for name, value in asdict(self).items() if name not in absent} | {
            "difference": self.difference()}

    def difference(self) -> str:
        """The verdict, or `equal` to the printed digit, or how far off; nothing where there is nothing to compare."""
        if self.verdict:
            return self.verdict
        if self.paper is None or self.ours is None or self.least is not None:
            return ""
        if f"{self.ours:.{self.digits}f}" == f"{self.paper:.{self.digits}f}":
            return "equal"
        return f"{self.ours - self.paper:+,.{self.digits + 1}f} ({self.ours / self.paper - 1:+.2%})"


def names() -> list[str]:
    """Every table of the package."""
    return [module.name for module in pkgutil.iter_modules(tables.__path__) if module.name not in INFRASTRUCTURE]


def load(name: str):
    """The module of a table."""
    return importlib.import_module(f"research.tables.{name}")


def published(experiment: str, *fields: str):
    """The settings of `FILE` or `FILE:arm` under experiments/, with `group.field=value` set."""
    file, _, arm = experiment.partition(":")
    return settings_of(f"{ROOT}/experiments/{file}.py" + (f":{arm}" if arm else ""), fields)


def provenance(command: str, seeds: tuple[int, ...] = ()) -> dict:
    """What a scale's rows were made by and on; taken before results are written, which change the working tree."""
    about = describe()
    return {"command": command, "commit": about["commit"], "jax": about["packages"]["jax"], "seeds": list(seeds),
            "machine": machine(about)}


def machine(about: dict) -> str:
    """Processor, and GPU if there was one, of what `environment.describe` says."""
    kind = about["device"].split(" ", 1)
    return about["processor"] + ("" if kind[0] == "cpu" else f", {kind[1]}")


def scales(table) -> tuple[str, ...]:
    """Those that a table has."""
    return tuple(table.SCALES if hasattr(table, "SCALES") else kind(table).SIZES)


def kind(table):
    """The module that trains and measures a table's models."""
    from research.tables import study

    return getattr(table, "KIND", study)


def write(name: str, scale: str, rows: list[Row], made: dict, folder: Path) -> None:
    """Puts a scale's rows into `folder/NAME.json` and shows all scales in `NAME.md` and `NAME.png`.

    Rows that stand there already keep what they were made by; where nothing differs, nothing is written.
    """
    table, path = load(name), folder / f"{name}.json"
    before = _read(path)
    new = [row.to_json() for row in rows]
    kept = before.get("made", {})
    if before.get("rows", {}).get(scale) != new or kept.get(scale, {}).get("not_run") != made.get("not_run"):
        kept = kept | {scale: made}
    found = {"table": name, "title": table.TITLE, "source": table.SOURCE, "notes": list(getattr(table, "NOTES", ())),
             "rows": before.get("rows", {}) | {scale: new}, "made": kept}
    every = {each: rows_of(found["rows"][each]) for each in SCALES if each in found["rows"]}
    page, picture = folder / f"{name}.md", folder / f"{name}.png"
    text = markdown(found, every, [each for each in scales(table) if each not in every])
    if found == before and picture.exists() and page.exists() and page.read_text() == text:
        return

    def draw(axes):
        for panel, (each, its) in zip(axes, every.items(), strict=True):
            table.draw(panel, its)
            panel.set_title(f"{table.TITLE} ({each})", loc="left", pad=24)

    folder.mkdir(parents=True, exist_ok=True)
    plots.save(picture, draw, len(every), getattr(table, "HEIGHT", plots.HEIGHT))
    write_whole(page, text)
    write_whole(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def markdown(found: dict, every: dict[str, list[Row]], absent: list[str]) -> str:
    """The page of a table; `absent` are the scales that it has and that were not run."""
    lines = [f"# {found['title']}", "", found["source"] + "."]
    for scale, rows in every.items():
        made = found["made"][scale]
        lines += ["", f"## {scale}", "", "| | unit | paper | ours | difference | ours is |", "|---" * 6 + "|"]
        lines += [f"| {row.what} | {row.unit} | {' | '.join(row.cells())} | {row.difference()} | {row.how} |"
                  for row in rows]
        seeds = f"; seeds {', '.join(map(str, made['seeds']))}" if made["seeds"] else ""
        trained = f", trained at {made['trained_at']}" if "trained_at" in made else ""
        lines += ["", f"`{made['command']}` at {made['commit']}{trained}; {made['machine']}, JAX {made['jax']}{seeds}."]
        if made.get("not_run"):
            lines += ["", f"Not yet run at this scale: the size {', '.join(made['not_run'])}."]
    for scale in absent:
        lines += ["", f"## {scale}", "",
                  f"Not yet run: `python -m research.tables --table={found['table']} --scale={scale}`."]
    lines += [""] + [f"- {note}" for note in found["notes"]]
    return "\n".join([*lines, "", f"![{found['title']}]({found['table']}.png)", ""])


def rows_of(found: list[dict]) -> list[Row]:
    """The rows that `Row.to_json` wrote."""
    return [Row(**{name: value for name, value in row.items() if name != "difference"}) for row in found]


def _read(path: Path) -> dict:
    """What stands in a results file, {} where there is none."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RequestError(f"{path} is not JSON ({error}): delete it to make it anew") from None


def compared(rows: list[Row]) -> dict:
    """Rows of one unit as `plots.bars` takes them."""
    return {"labels": [row.what for row in rows], "digits": max(row.digits for row in rows),
            "series": {"paper": [row.paper for row in rows], "ours": [row.ours for row in rows]}}


def of_unit(rows: list[Row], unit: str) -> list[Row]:
    """Those of one unit."""
    return [row for row in rows if row.unit == unit]
