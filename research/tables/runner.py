"""A paper's table beside ours: its rows, and the three files that show them.

A table is a module of this package with TITLE, SOURCE (paper and table), SCALES ({scale: function that gives its Rows})
and `draw(axes, rows)`, the picture of one scale's rows. NOTES, where it has them, say what the sources leave open or
get wrong. `results/NAME.json` holds the rows of every scale that was made, by scale, so that a run at one scale leaves
the others as they stand; the Markdown and the picture show all of them.
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
INFRASTRUCTURE = ("__main__", "runner")
SCALES = ("analytic", "cpu", "gpu")


@dataclass(frozen=True)
class Row:
    """One figure: the paper's, as it is printed with `digits` decimals, and ours; None where one of them is missing."""

    what: str
    unit: str
    paper: float | None
    ours: float | None
    digits: int = 0
    how: str = ""  # how ours comes about

    def difference(self) -> str:
        """`equal` to the printed digit, or how far off; nothing where there is nothing to compare."""
        if self.paper is None or self.ours is None:
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
    kind = about["device"].split(" ", 1)
    return {"command": command, "commit": about["commit"], "jax": about["packages"]["jax"], "seeds": list(seeds),
            "machine": about["processor"] + ("" if kind[0] == "cpu" else f", {kind[1]}")}


def write(name: str, scale: str, rows: list[Row], made: dict, folder: Path) -> None:
    """Puts a scale's rows into `folder/NAME.json` and shows all scales in `NAME.md` and `NAME.png`."""
    table, path = load(name), folder / f"{name}.json"
    found = _read(path)
    found = {"table": name, "title": table.TITLE, "source": table.SOURCE, "notes": list(getattr(table, "NOTES", ())),
             "rows": found.get("rows", {}) | {scale: [asdict(row) | {"difference": row.difference()} for row in rows]},
             "made": found.get("made", {}) | {scale: made}}
    every = {each: [Row(**{key: value for key, value in row.items() if key != "difference"})
                    for row in found["rows"][each]] for each in SCALES if each in found["rows"]}

    def draw(axes):
        for panel, (each, its) in zip(axes, every.items(), strict=True):
            table.draw(panel, its)
            panel.set_title(f"{table.TITLE} ({each})", loc="left", pad=24)

    folder.mkdir(parents=True, exist_ok=True)
    plots.save(folder / f"{name}.png", draw, len(every))
    write_whole(folder / f"{name}.md", markdown(found, every))
    write_whole(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def markdown(found: dict, every: dict[str, list[Row]]) -> str:
    """The page of a table."""
    lines = [f"# {found['title']}", "", found["source"] + "."]
    for scale, rows in every.items():
        made = found["made"][scale]
        lines += ["", f"## {scale}", "", "| | unit | paper | ours | difference | ours is |", "|---" * 6 + "|"]
        for row in rows:
            numbers = ["" if x is None else f"{x:,.{row.digits}f}" for x in (row.paper, row.ours)]
            lines.append(f"| {row.what} | {row.unit} | {' | '.join(numbers)} | {row.difference()} | {row.how} |")
        seeds = f"; seeds {', '.join(map(str, made['seeds']))}" if made["seeds"] else ""
        lines += ["", f"`{made['command']}` at {made['commit']}; {made['machine']}, JAX {made['jax']}{seeds}."]
    lines += [""] + [f"- {note}" for note in found["notes"]]
    return "\n".join([*lines, "", f"![{found['title']}]({found['table']}.png)", ""])


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
