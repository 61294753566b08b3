"""What a run says of itself: a JSON line and TensorBoard scalars for every step, a progress bar, its time by phase."""

import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path

import numpy as np
from absl import logging
from tqdm import tqdm

from research.files import write_whole

PHASES = ("compile", "train", "data", "evaluate", "save")
DIVERGED = "diverged"  # the split of the last line of a run of a table whose loss stopped being a number


class Clock:
    """Seconds of a run by phase, over all its restarts; `data` is what the step had to wait for batches."""

    def __init__(self, seconds: dict | None = None):
        self.seconds = dict.fromkeys(PHASES, 0.0) | (seconds or {})

    @contextlib.contextmanager
    def phase(self, name: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


class MetricsLog:
    """`metrics.jsonl` and `tensorboard/` of a workdir, both continued after `step`."""

    def __init__(self, workdir: Path, step: int):
        """Cuts both back to `step`: what came later was not saved and will be done again.

        `validated` is {step: loss} of the evaluations that are kept.
        """
        self.path = workdir / "metrics.jsonl"
        kept = [line for line in read_lines(self.path) if line["step"] <= step]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.validated = {line["step"]: line["loss"] for line in kept if line["split"] == "validation"}
        self._file = self.path.open("a")
        self._board = Board(workdir / "tensorboard", step + 1)

    def write(self, line: dict) -> None:
        """Appends one line and its scalars; whole lines only, each handed to the system at once.

        Tables, as the loads of experts by layer, stay out of TensorBoard: V3's would be 15,000 scalars.
        """
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._board.write(line["step"], {
            f"{line['split']}/{name}" + (f"/{number}" if isinstance(value, list) else ""): scalar
            for name, value in line.items() if name not in ("step", "split") and not is_table(value)
            for number, scalar in enumerate(value if isinstance(value, list) else [value], start=1)})

    def sync(self) -> None:
        """Returns when every line is on the disk: a checkpoint may follow."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # each line was flushed; one that failed was reported then
            self._file.close()
        with contextlib.suppress(OSError):
            self._board.close()


class NoLog:
    """Where another process writes the metrics."""

    def __init__(self, validated: dict):
        self.validated = validated

    def write(self, line: dict) -> None:
        """Nothing, as `sync` and `close` do."""

    def sync(self) -> None: ...

    def close(self) -> None: ...


def is_table(value) -> bool:
    """Whether a field of a line is a list of lists."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], list)


class Board:
    """TensorBoard's event file of this process. Written at once and in this thread: a full disk is an error here."""

    def __init__(self, folder: Path, first: int):
        """`first`: the step from which on TensorBoard forgets what earlier files of the folder say."""
        from tensorboardX.record_writer import RecordWriter  # slow to import, and only training needs it

        folder.mkdir(exist_ok=True)
        self._writer = RecordWriter(str(folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"))
        self._event(file_version="brain.Event:2")
        self._event(step=first, session_log={"status": "START"})

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """One event with all scalars of a line."""
        self._event(step=step, summary={"value": [
            {"tag": tag, "simple_value": scalar} for tag, scalar in scalars.items()]})

    def close(self) -> None:
        self._writer.close()

    def _event(self, **fields) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._writer.flush()


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a metrics file up to the first that is none: a torn last one, left by a kill, is dropped."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int) or "split" not in line:
            break
        lines.append(line)
    return lines


def to_plain(metrics: dict) -> dict:
    """Arrays to numbers and lists of numbers."""
    return {name: np.asarray(value).tolist() for name, value in metrics.items()}


class Progress:
    """How far a run is, on stderr: a bar with an ETA on a terminal, elsewhere a line every half minute."""

    def __init__(self, steps: int, done: int, shown: bool = True, unit: str = "step"):
        self._steps, self._shown, self._unit, self._bar = steps, shown, unit, None
        self._first, self._start, self._said = None, 0.0, 0.0  # of the lines: where and when the first step was done
        if shown and sys.stderr.isatty():
            self._bar = tqdm(
                total=steps, initial=done, dynamic_ncols=True, mininterval=0.5, file=sys.stderr,
                bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]")

    def update(self, step: int, text: str) -> None:
        """`step` is done; `text` says how it went."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._first is None:
            self._first, self._start, self._said = step, now, now
        elif self._shown and now - self._said >= 30:
            self._said = now
            left = (now - self._start) / (step - self._first) * (self._steps - step)
            logging.info("%s %d of %d: %s, %s left", self._unit, step, self._steps, text, tqdm.format_interval(left))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
