"""A run that is watched in a notebook, and pictures that change with sliders."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from research import plots
from research.errors import RunError
from research.reporting.run import column, table
from research.training.metrics import read_lines

STATIC = "PARSIMONY_STATIC"  # set where a notebook is executed and nobody moves a slider
SECONDS = 5  # between two pictures of a run that is watched


def show(draw: Callable, panels: int = 1, height: float = 3.2) -> None:
    """A picture that `draw` fills, as `plots.save` has it, as the cell's output."""
    show_in_place(None, draw, panels, height)


def show_in_place(shown, draw: Callable, panels: int = 1, height: float = 3.2):
    """As `show`, in the place of the picture for which this has returned `shown`; None: of none."""
    from IPython.display import Image, display

    picture = Image(plots.png(draw, panels, height))
    if shown is None:
        return display(picture, display_id=True)
    shown.update(picture)
    return shown


def explore(picture: Callable, **places: list) -> None:
    """`picture(name=value, ...)` with a slider over each name's values; it starts at their middle.

    Where nobody moves sliders, the pictures of the first name's values instead, the others at their middle.
    """
    middles = {name: values[len(values) // 2] for name, values in places.items()}
    if os.environ.get(STATIC):
        first, values = next(iter(places.items()))
        for value in dict.fromkeys((values[0], middles[first], values[-1])):
            print(", ".join(f"{name} = {chosen}" for name, chosen in (middles | {first: value}).items()))
            picture(**(middles | {first: value}))
        return
    from ipywidgets import SelectionSlider, interact

    interact(picture, **{name: SelectionSlider(options=values, value=middles[name], description=name)
                         for name, values in places.items()})


def train(config: str, workdir: str, fields: dict, picture: Callable[[list[dict]], tuple] | None = None) -> list[dict]:
    """`python -m research.main --config=... --workdir=... --config.FIELD=VALUE ...`; returns the lines of its metrics.

    A run that has ended is not trained again. picture: (draw, panels) of the lines so far, shown again and again in the
    same place. RunError with what the command said where it fails.
    """
    path, shown, words = Path(workdir), None, [f"--config.{name}={value}" for name, value in fields.items()]
    command = [sys.executable, "-m", "research.main", f"--config={config}", f"--workdir={workdir}", *words]
    print(" ".join(["python", *command[1:]]).replace(" --config.", " \\\n    --config."))
    if is_finished(path, fields):
        lines = read_lines(path / "metrics.jsonl")
        if picture:
            show(*picture(lines))
        return lines
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f"{path.name}.log").open("w+") as log:
        run = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while run.poll() is None:
                time.sleep(SECONDS if picture else 0.5)
                if picture and (lines := read_lines(path / "metrics.jsonl")):
                    shown = show_in_place(shown, *picture(lines))
        finally:
            run.terminate()  # a cell that is interrupted stops its run, which saves
            run.wait()
        if run.returncode:
            log.seek(0)
            raise RunError(f"the run failed: {log.read()[-2000:]}")
    return read_lines(path / "metrics.jsonl")


def is_finished(workdir: Path, fields: dict) -> bool:
    """Whether a run with so many steps stands there, its last evaluation included."""
    lines = read_lines(workdir / "metrics.jsonl")
    return bool(lines) and lines[-1]["split"] == "validation" and lines[-1]["step"] == fields.get("training.steps")


def run_so_far(lines: list[dict]) -> tuple[Callable, int]:
    """(draw, panels) of a run: loss by step, and each expert's load in the newest evaluation."""
    train, held = ([line for line in lines if line["split"] == split] for split in ("train", "validation"))
    loads = next(((line["step"], rows) for line in reversed(held) if (rows := table(line, "expert_load"))), None)

    def draw(axes):
        series = {"next token": column(train, "next_token_loss"),
                  "the token after (depth 1)": column(train, "mtp_loss", 0),
                  "next token, held out": column(held, "loss")}
        plots.lines(axes[0], {name: found for name, found in series.items() if found[0]}, "step", "nats a token")
        if loads:
            plots.ink(axes[1], loads[1], [str(1 + layer) for layer in range(len(loads[1]))],
                      [str(expert) for expert in range(len(loads[1][0]))], "layer", "expert", "load / mean")
            axes[1].set_title(f"load of each expert on held-out text, step {loads[0]:,}", loc="left")

    return draw, 2 if loads else 1


def summary_of(lines: list[dict]) -> str:
    """The last evaluation in a line."""
    last = next(line for line in reversed(lines) if line["split"] == "validation")
    worst = max(itertools.chain(*table(last, "expert_load")), default=0)
    return (f"step {last['step']:,}: {last['loss']:.3f} nats a token, {last['bits_per_byte']:.3f} bits a byte; "
            f"the busiest expert has {worst:.2f} times its layer's mean load")
