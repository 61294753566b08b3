"""One self-contained HTML page of a run: `python -m research.report --workdir=DIR` leaves DIR/report.html.

Its configuration, curves, load of experts, time, samples and environment, as far as the run got: one that still runs
may be looked at too. The page needs no network and no script, and shows on a phone, in the dark and on paper.
"""

from pathlib import Path

from absl import flags

from research import command, plots
from research.errors import RequestError
from research.files import write_whole

FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string("workdir", None, "The directory of the run.", FLAGS)


def main() -> None:
    if not _WORKDIR.value:
        raise RequestError("--workdir is required: the directory of the run")
    plots.require("research.report")

    with command.stops_held():
        from research.reporting.page import page
        from research.reporting.run import read

    run = read(Path(_WORKDIR.value).expanduser())
    write_whole(run.workdir / "report.html", page(run))
    for notice in run.notices:
        print(notice)
    print(run.workdir / "report.html")


if __name__ == "__main__":
    command.run(main, FLAGS)
