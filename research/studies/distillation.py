"""A pipeline of research.distill that ran in a notebook, looked into; and the table of the three seeds."""

import json
import subprocess
import sys
import time
from pathlib import Path

from experiments import base
from research import plots
from research.distillation import rejection, sample, tasks
from research.distillation.settings import check
from research.distillation.template import final_answer
from research.distillation.verify import number
from research.errors import RunError
from research.experiment import flatten
from research.training.metrics import read_lines

_REASONS = ("kept", *rejection.REASONS)


def distill(config: str, workdir: str, fields: dict, stage: str = "all") -> None:
    """`python -m research.distill --config=... --stage=... --workdir=... --config.FIELD=VALUE ...`, its stages timed.

    What is done is not done again. RunError with what the command said where it fails.
    """
    words = [f"--config.{name}={value}" for name, value in fields.items()]
    command = [sys.executable, "-m", "research.distill", f"--config={config}", f"--stage={stage}",
               f"--workdir={workdir}", *words]
    print(" ".join(["python", *command[1:]]).replace(" --config.", " \\\n    --config."))
    start = time.monotonic()
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RunError(f"the run failed: {run.stderr[-2000:]}")
    print(f"{time.monotonic() - start:.0f} s")


class Distilled:
    """A folder of research.distill: its settings, problems by digest, samples, and what was kept of them."""

    def __init__(self, workdir: str):
        self.folder = Path(workdir)
        config = base.get_distillation_config()
        config.update_from_flattened_dict(flatten(json.loads((self.folder / "config.json").read_bytes())))
        self.settings = check(config)
        train, test = tasks.train_and_test(self.settings.task)
        self.problems = {problem.digest.hex(): problem for problem in train + test}
        self.samples = sample.read(self.folder / "samples.jsonl")
        lines = (self.folder / "verified.jsonl").read_text("utf-8").splitlines()
        self.kept = {(row["problem"], row["number"]) for row in map(json.loads, lines)}
        self.models = json.loads((self.folder / "results.json").read_bytes())["models"]

    def right(self, line) -> bool:
        """Of a sample of a problem with a numeric answer."""
        answer = final_answer(line.text)
        return answer is not None and number(answer) == number(self.problems[line.problem].answer)

    def told(self) -> str:
        """What the teacher says to one problem, of which some is kept and some is not: where there is such a one."""
        by_problem: dict = {}
        for line in self.samples:
            by_problem.setdefault(line.problem, []).append(line)
        mixed = [lines for lines in by_problem.values() if len({self.right(line) for line in lines}) == 2]
        lines = (mixed or list(by_problem.values()))[0]
        problem = self.problems[lines[0].problem]
        text = [f"{self.settings.template.prompt(problem.question)}[the answer is {problem.answer}]"]
        for line in lines:
            right, kept = self.right(line), (line.problem, line.number) in self.kept
            said = "right" if right else "wrong"
            text.append(f"--- sample {line.number}, {said}, {'taught' if kept else 'not taught'}\n{line.text}")
        return "\n".join(text)

    def answers(self, *names: str) -> str:
        """The first response of these models to the first problem of the test that the last of them solves."""
        responses = {}
        for name in names:
            path = self.folder / "evaluation" / f"{name}-{self.models[name]['step']}.sampled.jsonl"
            responses[name] = {line.problem: line for line in sample.read(path) if line.number == 0}
        chosen = next((key for key, line in responses[names[-1]].items() if self.right(line)),
                      next(iter(responses[names[-1]])))
        text = [self.settings.template.prompt(self.problems[chosen].question)]
        text += [f"--- {name}, {'right' if self.right(responses[name][chosen]) else 'wrong'}\n"
                 f"{responses[name][chosen].text}" for name in names]
        return "\n".join(text)

    def draw_verdicts(self, axes) -> None:
        """How many samples were kept, and for which reason the others were not."""
        counts = json.loads((self.folder / "verification.json").read_bytes())["counts"]
        found = {name: counts[name] for name in _REASONS if counts[name]}
        plots.bars(axes, list(found), {"samples": list(found.values())}, f"of {counts['given']:,} samples", 0)

    def draw_rewards(self, axes, *names: str, window: int = 5) -> None:
        """The accuracy of rollouts by update, means of so many."""
        series = {}
        for name in names:
            lines = [line for line in read_lines(self.folder / name / "metrics.jsonl") if "reward" in line]
            values = [line["accuracy"] for line in lines]
            means = [sum(part) / len(part) for part in (values[max(0, end - window):end]
                                                        for end in range(1, len(values) + 1))]
            series[name] = [line["step"] for line in lines], means
        plots.lines(axes, series, "update", "right rollouts, share")


def of_table(path: str) -> dict[str, dict[str, dict]]:
    """{unit: {arm: row}} of the models of results/r1_distill.json, without the rows of differences."""
    found: dict = {}
    for row in json.loads(Path(path).read_bytes())["rows"]["cpu"]:
        if not row.get("verdict"):
            found.setdefault(row["unit"], {})[row["what"].split(": ", 1)[1]] = row
    return found


def draw_samples(axes, found: dict) -> None:
    """pass@1 by how many samples were taught: mean and range over seeds, the base and the teacher beside them."""
    taught, right = found["samples taught"], found["pass@1, %"]
    arms = sorted(taught, key=lambda arm: taught[arm]["ours"])
    x = [taught[arm]["ours"] for arm in arms]
    series = {"distilled": (x, *([right[arm][key] for arm in arms] for key in ("ours", "least", "greatest")))}
    for name in ("teacher", "reinforced", "base"):
        series[name] = [x[0], x[-1]], [right[name]["ours"]] * 2
    plots.lines(axes, series, "samples taught", "pass@1, %")
    axes.set_ylim(0, 100)


def draw_students(axes, found: dict, *arms: str) -> None:
    """pass@1 of each model: mean and range over seeds."""
    rows = [found["pass@1, %"][arm] for arm in arms]
    plots.ranges(axes, list(arms), {"three seeds": [(row["ours"], row["least"], row["greatest"]) for row in rows]},
                 "pass@1, %: mean and range over seeds")
    axes.set_xlim(0, 100)
