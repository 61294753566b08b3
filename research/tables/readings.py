"""Tables that read more off their models than training does: study.py's runs, and a measurement of each in its workdir.

It is made once a run is finished, left in `NAME.json` of the workdir, and goes where the run is trained again.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

from absl import logging

from research.files import write_whole
from research.tables import study


@dataclass(frozen=True)
class Reading:
    """Stands in for study.py as a table's KIND. read: what is measured of a finished run; name: of file and line."""

    name: str
    read: Callable[[study.Run], dict]
    SIZES = study.SIZES
    plan = staticmethod(study.plan)

    def train(self, runs: list[study.Run]) -> None:
        """Trains those that are not finished, then reads those that are not read; raises as study.train."""
        study.train(runs)
        missing = [run for run in runs if self.lines_of(run) is None]
        for number, run in enumerate(missing):
            logging.info("%s: %s, read of %d of %d runs", run, self.name, len(runs) - len(missing) + number, len(runs))
            write_whole(run.workdir / f"{self.name}.json", json.dumps(self.read(run)) + "\n")

    def lines_of(self, run: study.Run) -> list[dict] | None:
        """The metrics of a finished run and, as one line more, what was read off it, unless it diverged; None for any
        other."""
        lines, path = study.lines_of(run), run.workdir / f"{self.name}.json"
        if study.diverged(lines):
            return lines
        if lines is None or not path.exists():
            return None
        return [*lines, {"split": self.name} | json.loads(path.read_bytes())]
