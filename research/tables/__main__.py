"""The papers' tables beside ours: `python -m research.tables [--table=NAME|all] [--scale=analytic|cpu|gpu]`.

Leaves results/NAME.json, .md and .png: the paper's figures, ours, the difference, the command, commit and machine.
Without a name it lists the tables.
"""

import os
from pathlib import Path

from absl import flags

from research import command
from research.errors import RequestError, nearest

FLAGS = flags.FlagValues()
_TABLE = flags.DEFINE_string("table", None, "The table's name, or all.", FLAGS)
_SCALE = flags.DEFINE_enum("scale", "analytic", ["analytic", "cpu", "gpu"], "What ours come from: configurations, or "
                           "models trained on this machine's CPU or GPU.", FLAGS)
_FOLDER = flags.DEFINE_string("folder", "results", "Where the files go.", FLAGS)


def main() -> None:
    with command.stops_held():
        from research import plots
        from research.tables import runner

    every = {name: runner.load(name) for name in runner.names()}
    if _TABLE.value is None:
        for name, table in every.items():
            print(f"{name:<22}{', '.join(table.SCALES):<10}{table.TITLE}")
        return
    if _TABLE.value not in (*every, "all"):
        raise RequestError(f"--table={_TABLE.value!r} is no table{nearest(_TABLE.value, every)}; "
                           f"there are {', '.join(every)}, and all")
    chosen = [name for name in every if _TABLE.value in (name, "all") and _SCALE.value in every[name].SCALES]
    if not chosen:
        some = "no table has it" if _TABLE.value == "all" else \
            f"{_TABLE.value} has {', '.join(every[_TABLE.value].SCALES)}"
        raise RequestError(f"--scale={_SCALE.value}: {some}")
    folder = Path(_FOLDER.value)
    first = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not _FOLDER.value or not first.is_dir() or not os.access(first, os.W_OK):
        raise RequestError(f"--folder={_FOLDER.value!r} is not a folder that can be written")
    plots.require(f"--table={_TABLE.value}")
    made = {name: runner.provenance(f"python -m research.tables --table={name} --scale={_SCALE.value}")
            for name in chosen}
    for name in chosen:
        rows = every[name].SCALES[_SCALE.value]()
        runner.write(name, _SCALE.value, rows, made[name], folder)
        pairs = [row for row in rows if row.difference()]
        same = sum(row.difference() == "equal" for row in pairs)
        print(f"{name:<22}{same} of {len(pairs)} of the paper's figures equal to the printed digit: {folder / name}.md",
              flush=True)


if __name__ == "__main__":
    command.run(main, FLAGS)
