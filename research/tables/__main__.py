"""The papers' tables beside ours: `python -m research.tables [--table=NAME|all] [--scale=analytic|cpu|gpu]`.

Leaves results/NAME.json, .md and .png: the paper's figures, ours, the difference, the command, commit and machine.
Without a name it lists the tables. At the scales cpu and gpu it trains what is not yet trained, in runs/tables: stopped
or killed, the same command goes on. `--sizes`, `--seeds` and `--config.group.field=value` make it shorter.
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
_FOLDER = flags.DEFINE_string(
    "folder", None, "Where the files go: results, or results/tmp where --config.… or fewer seeds make another table.",
    FLAGS)
_RUNS = flags.DEFINE_string("runs", "runs/tables", "Where trained models lie.", FLAGS)
_SIZES = flags.DEFINE_list("sizes", None, "Train these sizes of the scale alone: micro, mini | gpu.", FLAGS)
_SEEDS = flags.DEFINE_list("seeds", None, "Seeds of each arm: 0,1,2.", FLAGS)
_FIELDS = flags.DEFINE_multi_string(
    "config.", [], "--config.group.field=value changes a field of every arm.", FLAGS)


def main() -> None:
    with command.stops_held():
        from research import plots
        from research.tables import runner

    every = {name: runner.load(name) for name in runner.names()}
    if _TABLE.value is None:
        for name, table in every.items():
            print(f"{name:<22}{', '.join(runner.scales(table)):<10}{table.TITLE}")
        return
    if _TABLE.value not in (*every, "all"):
        raise RequestError(f"--table={_TABLE.value!r} is no table{nearest(_TABLE.value, every)}; "
                           f"there are {', '.join(every)}, and all")
    scale = _SCALE.value
    chosen = [name for name in every if _TABLE.value in (name, "all") and scale in runner.scales(every[name])]
    if not chosen:
        raise RequestError(f"--scale={scale}: {_TABLE.value} has {', '.join(runner.scales(every[_TABLE.value]))}")
    seeds = seeds_of_request()
    folder = folder_of_request(shorter=bool(_FIELDS.value) or seeds is not None and len(seeds) < 3)
    plots.require(f"--table={_TABLE.value}")
    if scale == "analytic":
        if _FIELDS.value or seeds or _SIZES.value:
            raise RequestError("--scale=analytic trains nothing: --config.…, --seeds and --sizes are for cpu and gpu")
        made = {name: runner.provenance(f"python -m research.tables --table={name} --scale=analytic")
                for name in chosen}
        for name in chosen:
            rows = every[name].SCALES[scale]()
            runner.write(name, scale, rows, made[name], folder)
            said(name, rows, folder)
    else:
        trained({name: every[name] for name in chosen}, seeds, folder)


def trained(tables: dict, seeds: tuple[int, ...] | None, folder: Path) -> None:
    """Trains what the tables miss and writes them, one after another; every run is checked before the first."""
    from research import environment
    from research.tables import judgement, runner, study

    environment.compute_in_this_thread()
    scale, kinds = _SCALE.value, {name: runner.kind(table) for name, table in tables.items()}
    known = list(dict.fromkeys(size for kind in kinds.values() for size in kind.SIZES[scale]))
    sizes = _SIZES.value or known
    for size in sizes:
        if size not in known:
            raise RequestError(f"--sizes={size}: {scale} has {', '.join(known)}")
    study.check_device(scale)
    plans = {name: kinds[name].plan(table.STUDY, kinds[name].SIZES[scale], seeds or table.STUDY.seeds, _FIELDS.value,
                                    Path(_RUNS.value)) for name, table in tables.items()}
    words = [f"--seeds={','.join(map(str, seeds))}"] if seeds else []
    words += [f"--config.{text}" for text in _FIELDS.value]
    for name, runs in plans.items():
        kinds[name].train([run for run in runs if run.size in sizes])
        figures = study.measure(tables[name].STUDY, runs, kinds[name].lines_of)
        rows = judgement.rows(tables[name].STUDY, figures)
        made = study.provenance(" ".join([f"python -m research.tables --table={name} --scale={scale}", *words]), runs,
                                figures)
        runner.write(name, scale, rows, made, folder)
        said(name, rows, folder)


def said(name: str, rows: list, folder: Path) -> None:
    """The line of a table that is written."""
    verdicts = [row.verdict for row in rows if row.verdict]
    pairs = [row.difference() for row in rows if row.difference()]
    found = ", ".join(f"{verdicts.count(each)} {each}" for each in dict.fromkeys(verdicts)) if verdicts else \
        f"{pairs.count('equal')} of {len(pairs)} of the paper's figures equal to the printed digit"
    print(f"{name:<22}{found}: {folder / name}.md", flush=True)


def seeds_of_request() -> tuple[int, ...] | None:
    """Of --seeds; None without it."""
    if _SEEDS.value is None:
        return None
    try:
        seeds = tuple(map(int, _SEEDS.value))
    except ValueError:
        seeds = ()
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise RequestError(f"--seeds={','.join(_SEEDS.value)!r} must be different whole numbers, 0 or more, "
                           "with commas between them")
    return seeds


def folder_of_request(shorter: bool) -> Path:
    """Where the files go, found to be writable; a shorter table does not take the place of a whole one unasked."""
    value = _FOLDER.value
    if value is None:
        value = "results/tmp" if shorter else "results"
    folder = Path(value)
    first = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not value or not first.is_dir() or not os.access(first, os.W_OK):
        raise RequestError(f"--folder={value!r} is not a folder that can be written")
    return folder


if __name__ == "__main__":
    command.run(main, FLAGS, command.KEPT_PAGES)
