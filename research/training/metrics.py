"""What a run says of itself: a JSON line and TensorBoard scalars for every step, a progress bar, where the time went."""

import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

PHASES = ("compile", "train", "data", "evaluate", "save")


class Clock:
    """Seconds of a run by phase, over all its restarts; `data` is what the step had to wait for batches."""

    def __init__(self, seconds: dict | None = None):
        self.seconds = dict.fromkeys(PHASES, 0.0) | (seconds or {})

    @contextmanager
    def phase(self, name: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())


class MetricsLog:
    """`metrics.jsonl` and `tensorboard/` of a workdir, both continued after `step`."""

    def __init__(self, workdir: Path, step: int):
        """Cuts both back to `step`: what came later was not saved and will be done again."""
        from tensorboardX import SummaryWriter  # slow to import, and only training needs it

        self.path = workdir / "metrics.jsonl"
        kept = [line for line in read_lines(self.path) if line["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        self.validated = {line["step"] for line in kept if line["split"] == "validation"}
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, line: dict) -> None:
        """Appends one line and its scalars; whole lines only, each handed to the system at once."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in line.items():
            for number, scalar in enumerate(value if isinstance(value, list) else [value], start=1):
                if isinstance(scalar, int | float) and name != "step":
                    tag = f"{line['split']}/{name}" + (f"/{number}" if isinstance(value, list) else "")
                    self._board.add_scalar(tag, scalar, line["step"])

    def sync(self) -> None:
        """Returns when every line is on the disk: a checkpoint may follow."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a metrics file; a torn last one, left by a kill, is dropped."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def to_plain(metrics: dict) -> dict:
    """Arrays to numbers and lists of numbers."""
    return {name: np.asarray(value).tolist() for name, value in metrics.items()}


def progress(steps: int, done: int) -> tqdm:
    """A bar with an ETA on stderr; where nobody watches (no terminal), a line every half minute."""
    watched = sys.stderr.isatty()
    return tqdm(total=steps, initial=done, unit="step", dynamic_ncols=watched, mininterval=0.5 if watched else 30,
                file=sys.stderr)
