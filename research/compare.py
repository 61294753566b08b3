"""Losses of finished runs beside a baseline's: `python -m research.compare --baseline=ARM --folder=DIR`.

DIR holds workdirs named ARM-SEED; a run is compared with the baseline's of its seed. Two distances, each relative: of
the last validation loss, and of the training loss, smoothed by an exponential moving average of coefficient 0.9 (as the
curves of V3 Appendix B.1): the mean of its magnitude over the last half of the steps.
"""

import re
import statistics
from pathlib import Path

from absl import flags

from research import command
from research.errors import RequestError
from research.training.metrics import read_lines

FLAGS = flags.FlagValues()
_BASELINE = flags.DEFINE_string("baseline", None, "The arm that others are compared with.", FLAGS)
_FOLDER = flags.DEFINE_string("folder", None, "Where the workdirs ARM-SEED lie.", FLAGS)


def losses(workdir: Path) -> tuple[float, list[float]]:
    """The last validation loss of a run and its smoothed training losses, one a step; RequestError without them."""
    lines = read_lines(workdir / "metrics.jsonl")
    validation = [line["loss"] for line in lines if line["split"] == "validation"]
    smooth, average = [], None
    for line in lines:
        if line["split"] == "train":
            average = line["loss"] if average is None else 0.9 * average + 0.1 * line["loss"]
            smooth.append(average)
    if not validation or not smooth:
        raise RequestError(f"{workdir}: its metrics.jsonl has no training or no validation loss: is the run finished?")
    return validation[-1], smooth


def distances(run: tuple[float, list[float]], base: tuple[float, list[float]]) -> tuple[float, float]:
    """(of the last validation loss, signed; of the smoothed training loss, magnitude), relative."""
    half = len(base[1]) // 2
    pairs = list(zip(run[1], base[1], strict=True))[half:]
    return run[0] / base[0] - 1, statistics.fmean(abs(a / b - 1) for a, b in pairs)


def table(folder: Path, baseline: str) -> str:
    """Markdown: an arm a line, means and ranges over seeds. RequestError where runs are missing or of other lengths."""
    runs: dict[str, dict[int, tuple[float, list[float]]]] = {}
    for path in sorted(folder.glob("*-*/metrics.jsonl")):
        if name := re.fullmatch(r"(.+)-(\d+)", path.parent.name):
            runs.setdefault(name[1], {})[int(name[2])] = losses(path.parent)
    if baseline not in runs:
        raise RequestError(f"--baseline={baseline!r}: no {folder}/{baseline}-SEED/metrics.jsonl; "
                           f"there are {', '.join(runs) or 'no runs'}")
    lines = ["| arm | seeds | validation loss | relative to baseline | training loss, last half, magnitude |",
             "|---|---|---|---|---|"]
    for arm, seeds in sorted(runs.items(), key=lambda item: item[0] != baseline):
        cells = [arm, " ".join(map(str, sorted(seeds))), _span([run[0] for run in seeds.values()], "{:.4f}")]
        if arm != baseline:
            found = []
            for seed, run in seeds.items():
                base = runs[baseline].get(seed)
                if base is None or len(base[1]) != len(run[1]):
                    raise RequestError(f"{folder}/{arm}-{seed}: no {baseline}-{seed} of as many steps to compare with")
                found.append(distances(run, base))
            cells += [_span([100 * d[0] for d in found], "{:+.2f}%"), _span([100 * d[1] for d in found], "{:.2f}%")]
        lines.append("| " + " | ".join(cells + ["", ""][: 5 - len(cells)]) + " |")
    return "\n".join(lines)


def _span(values: list[float], form: str) -> str:
    """Mean (least to greatest)."""
    mean, least, greatest = (form.format(x) for x in (statistics.fmean(values), min(values), max(values)))
    return f"{mean} ({least} to {greatest})" if len(values) > 1 else mean


def main() -> None:
    for flag in (_BASELINE, _FOLDER):
        if not flag.value:
            raise RequestError(f"--{flag.name} is missing: python -m research.compare --baseline=ARM --folder=DIR")
    if not Path(_FOLDER.value).is_dir():
        raise RequestError(f"--folder={_FOLDER.value!r} is no folder")
    print(table(Path(_FOLDER.value), _BASELINE.value))


if __name__ == "__main__":
    command.run(main, FLAGS)
