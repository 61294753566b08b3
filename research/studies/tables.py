"""The tables of results/, read: how many of a paper's figures come out as printed."""

import collections
import json
import re
from pathlib import Path

from research import plots
from research.tables.runner import Row, rows_of


def read(folder: str) -> dict[str, dict]:
    """{name: what `research.tables` wrote} of every table in the folder, in alphabetical order."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}
    return {name: table for name, table in found.items() if table.get("table") == name}


def rows(folder: str, name: str, scale: str = "cpu") -> list[Row]:
    """One table's rows of one scale."""
    return rows_of(read(folder)[name]["rows"][scale])


def agreement(rows: list[dict]) -> tuple[int, int]:
    """(equal to the printed digit, compared at all) of one scale's rows, those with a verdict left out."""
    compared = [row["difference"] for row in rows if row["difference"] and "verdict" not in row]
    return compared.count("equal"), len(compared)


def said(rows: list[dict]) -> str:
    """What comes of one scale's rows, in a line: how many figures are equal, and the verdicts on the others."""
    equal, compared = agreement(rows)
    verdicts = collections.Counter(row["verdict"] for row in rows if "verdict" in row)
    return ", ".join([f"{equal} of {compared} equal"] * bool(compared)
                     + [f"{number} {verdict}" for verdict, number in verdicts.items()])


def page(folder: str, name: str) -> str:
    """A table's page as it stands in the folder, without its picture."""
    return re.sub(r"^!\[.*\n?", "", (Path(folder) / f"{name}.md").read_text(), flags=re.MULTILINE)


def draw_agreement(axes, every: dict[str, dict]) -> None:
    """Figures of each table and scale: those that can be compared, and those of them that are equal."""
    counted = {f"{name} ({scale})": agreement(rows) for name, found in every.items()
               for scale, rows in found["rows"].items() if agreement(rows)[1]}
    plots.bars(axes, list(counted), {"can be compared": [compared for _, compared in counted.values()],
                                     "equal to the printed digit": [equal for equal, _ in counted.values()]},
               "figures", 0)
