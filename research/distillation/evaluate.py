"""How good the models of a folder are: estimates from their responses, and the report of all of them."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import base
from research import environment, plots
from research.accounting import flops, parameters
from research.distillation import estimates as estimate
from research.distillation import made
from research.distillation.sample import Sample, drafting
from research.distillation.settings import DRAWING, METHODS, Settings
from research.distillation.tasks import Problem
from research.distillation.template import final_answer, well_formed
from research.distillation.verify import Checker
from research.errors import RequestError
from research.experiment import flatten
from research.files import write_whole
from research.training.metrics import read_lines

NAMES = ("cold_start", "teacher", "base", *METHODS)  # of models' folders, in the order of the table
_WHAT = {"cold_start": "teacher after worked solutions", "teacher": "teacher after reinforcement",
         "base": "student after worked solutions", "reference": "student, reference answers without reasoning",
         "reinforced": "student, reinforced itself", "distilled": "student, verified samples",
         "unverified": "student, samples as they came", "logits": "student, the teacher's logits",
         "on_policy": "student, the teacher's distributions at what it says itself"}


def estimates(samples: dict[str, list[Sample]], problems: Sequence[Problem], checker: Checker) -> dict:
    """What the samples of each problem say: pass@1 with its 95% interval, pass@k and cons@k, shares and lengths; and on
    how many answers the checker has failed.

    samples: {`sampled`: k of each problem, `greedy`: one, or absent}.
    """
    place = {problem.digest.hex(): number for number, problem in enumerate(problems)}
    found, before = {}, Counter(checker.failures)
    for kind, lines in samples.items():
        answers, right = [[] for _ in problems], [[] for _ in problems]
        for line in lines:
            problem, answer = problems[place[line.problem]], final_answer(line.text)
            answers[place[line.problem]].append(answer)
            right[place[line.problem]].append(checker.right(problem, answer))
        k = len(right[0])
        if kind == "greedy":
            found["greedy"] = estimate.pass_at_1(right)._asdict()
            continue
        lengths = [line.tokens for line in lines]
        votes = [_votes(*each, checker) for each in zip(problems, answers, right, strict=True)]
        found |= {
            "k": k, "pass_at_1": estimate.pass_at_1(right)._asdict(), "pass_at_k": estimate.pass_at_k(right, k),
            "cons_at_k": estimate.cons_at_k(votes, right, k), "ended": float(np.mean([x.ended for x in lines])),
            "well_formed": float(np.mean([well_formed(x.text) for x in lines])), "tokens": float(np.mean(lengths)),
            "tokens_by_decile": np.percentile(lengths, range(0, 101, 10)).tolist()}
    return found | {"checker_failures": dict(checker.failures - before)}


def facts(folder: Path, settings, step: int | None) -> dict:
    """Of a model: its size, where it stands, and the floating-point operations of the run that made it, its own and
    those of the teacher that scored its rollouts.

    Passes over whole rows, padding included, count as the account counts training; a rollout, of the tokens read and
    drawn, and a pass that scores count a third of that a token, a forward pass.
    """
    per_token, trained, forward, teacher = flops.training_per_token(settings), 0.0, 0.0, 0.0
    for line in read_lines(folder / "metrics.jsonl"):
        if line["split"] == "train":
            trained = line["tokens"]
            forward += line.get("forward_tokens", 0)
            teacher += line.get("teacher_flops", 0)
    return {"parameters": parameters.count(settings)["total"], "step": step,
            "flops": (trained + forward / 3) * per_token, "teacher_flops": teacher}


def table(found: dict, evaluation) -> str:
    """A Markdown table, a line for each model, and one for what a paper says; evaluation: the config's group."""
    rows = ["| model | parameters | pass@1 (95%) | pass@k | cons@k | greedy | tokens | ended | training, TFLOP | "
            "its teacher's, TFLOP |", "|---|---|---|---|---|---|---|---|---|---|"]
    for name, x in found.items():
        one, greedy = x["pass_at_1"], f"{x['greedy']['value']:.1%}" if "greedy" in x else ""
        rows.append(
            f"| {name} | {x['parameters'] / 1e6:,.2f}M | {one['value']:.1%} ({one['low']:.1%}-{one['high']:.1%}) | "
            f"{x['pass_at_k']:.1%} | {x['cons_at_k']:.1%} | {greedy} | {x['tokens']:.1f} | {x['ended']:.1%} | "
            f"{x['flops'] / 1e12:,.1f} | " + (f"{x['teacher_flops'] / 1e12:,.1f} |" if x["teacher_flops"] else "|"))
    if evaluation.published:
        one, votes = (f"{value:.1f}%" if value else "" for value in (evaluation.published_pass_at_1,
                                                                    evaluation.published_cons_at_k))
        rows.append(f"| {evaluation.published}, published | | {one} | | {votes} | | | | | |")
    return "\n".join(rows)


def write(workdir: Path, settings: Settings, found: dict, problems: int) -> None:
    """Writes DIR/results.json and DIR/report.md with its pictures."""
    write_whole(workdir / "results.json", json.dumps({"seed": settings.seed, "problems": problems, "models": found},
                                                     indent=1) + "\n")
    k, text = next(iter(found.values()))["k"], ["# Reasoning and distillation\n"]
    text += [f"{problems:,} problems of the test, k = {k} responses to each at temperature "
             f"{settings.evaluation.temperature:g} and top-p {settings.evaluation.top_p:g}, up to "
             f"{settings.evaluation.max_tokens:,} tokens. The training column is of each model's own run, rollouts "
             "included, without what it started from; the last one is of the teacher, where it scored rollouts.\n",
             table(found, settings.evaluation) + "\n"]
    text += ["\n".join(f"- {name}: {_WHAT[name]}" for name in found if name in _WHAT) + "\n"]
    for name, x in found.items():
        text += _failures(x["checker_failures"], f"answers of {name}")
    text += _pictures(workdir, found) + _samples(workdir) + _made(workdir, settings, found)
    write_whole(workdir / "report.md", "\n".join(text))


def _pictures(workdir: Path, found: dict) -> list[str]:
    """Draws what there is to draw; nothing where matplotlib is missing, which runs do without."""
    try:
        plots.require("the report")
    except RequestError:
        return ["Without matplotlib (requirements-dev.txt) there are no pictures.\n"]
    values = {"pass@1, %": [100 * x["pass_at_1"]["value"] for x in found.values()],
              "cons@k, %": [100 * x["cons_at_k"] for x in found.values()]}
    plots.save(workdir / "accuracy.png", lambda axes: plots.bars(axes[0], list(found), values, "problems solved, %", 1),
               height=0.9 + 0.45 * len(found))
    text = ["![Accuracy](accuracy.png)\n"]
    curves = {}
    for name in ("teacher", *DRAWING):
        lines = [line for line in read_lines(workdir / name / "metrics.jsonl") if "reward" in line]
        if name in found and lines:
            steps, rewards = [line["step"] for line in lines], [line["reward"] for line in lines]
            window = max(1, len(rewards) // 20)
            means = [float(np.mean(rewards[max(0, end - window):end])) for end in range(1, len(rewards) + 1)]
            curves[name] = steps, means
    if curves:
        plots.save(workdir / "reward.png", lambda axes: plots.lines(
            axes[0], curves, "update", "reward (accuracy + format), mean"))
        text.append("![Reward](reward.png)\n")
    deciles = list(range(0, 101, 10))
    plots.save(workdir / "lengths.png", lambda axes: plots.lines(
        axes[0], {name: (deciles, x["tokens_by_decile"]) for name, x in found.items()}, "percentile of responses",
        "tokens"))
    return [*text, "![Lengths](lengths.png)\n"]


def _samples(workdir: Path) -> list[str]:
    """What was sampled and what was kept of it."""
    text = []
    if (workdir / "sampling.json").exists():
        told = json.loads((workdir / "sampling.json").read_bytes())
        text += ["## Samples\n", f"{told['samples']:,} samples of `{told['from']}`, {told['tokens']:,} tokens, "
                 f"{told['tokens_per_second']:,.0f} tokens/s{drafting(told)}.\n"]
    if (workdir / "verification.json").exists():
        told = json.loads((workdir / "verification.json").read_bytes())
        rates = np.array(list(told["pass_rate"].values()))
        text += ["| " + " | ".join(told["counts"]) + " |", "|" + "---|" * len(told["counts"]),
                 "| " + " | ".join(f"{count:,}" for count in told["counts"].values()) + " |\n",
                 f"Of {len(rates):,} problems {np.mean(rates == 0):.1%} were never answered rightly, "
                 f"{np.mean(rates == 1):.1%} always; pass rate {np.mean(rates):.1%}.\n"]
        text += _failures(told["checker_failures"], "samples")
    return text


def _failures(counts: dict[str, int], whose: str) -> list[str]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return [f"The checker failed on {whose}, which count as wrong: {kinds}.\n"] if kinds else []


def _made(workdir: Path, settings: Settings, models) -> list[str]:
    """The fields that differ from their defaults, as each thing here was made with them, and the machine."""
    default, where = flatten(base.get_distillation_config().to_dict()), environment.describe()
    # not of evaluation.checkpoint, whatever it is called
    there = {name: workdir / name for name in models
             if not settings.evaluation.checkpoint and (workdir / name).is_dir()}
    there |= {path.stem: path for path in (workdir / "samples.jsonl", workdir / "verified.jsonl") if path.exists()}
    told = {name: made.read(path) for name, path in there.items()}
    unknown = [name for name, fields in told.items() if not fields]
    told |= {name: made.fields_of(settings.fields, name) for name in [*unknown, "evaluation"]}
    changed = []
    for field in default:
        by_value: dict[str, list[str]] = {}
        for name, fields in told.items():
            if field in fields:
                by_value.setdefault(repr(fields[field]), []).append(name)
        if set(by_value) - {repr(default[field])}:
            changed.append(f"- `{field}`: " + (next(iter(by_value)) if len(by_value) == 1 else "; ".join(
                f"{value} ({', '.join(names)})" for value, names in by_value.items())))
    without = [f"Of {', '.join(unknown)} there is no record: taken to be as this command says.\n"] if unknown else []
    return ["## How it was made\n", f"Commit {where['commit']}, {where['processor']}, {where['device']}, Python "
            f"{where['python']}, JAX {where['packages']['jax']}, seed {settings.seed}. Fields that differ from "
            "experiments/base.py:\n", *changed, "", *without]


def _votes(problem: Problem, answers: Sequence[str | None], right: Sequence[bool], checker: Checker) -> list:
    """The answers as votes are counted, equal ones spelt alike: those that are right as the reference, others as the
    first that they equal: numbers by value, formulae by the checker, the rest up to blanks. None has no vote."""
    found: list[str | None] = []
    for answer, is_right in zip(answers, right, strict=True):
        if answer is None or is_right:
            found.append(None if answer is None else problem.answer)
            continue
        known = dict.fromkeys(other for other in found if other not in (None, problem.answer))
        found.append(next((other for other in known if _equal(problem, other, answer, checker)), answer))
    return found


def _equal(problem: Problem, one: str, other: str, checker: Checker) -> bool:
    if problem.check == "reasoning_gym":  # its scorer knows the reference alone
        return "".join(one.split()) == "".join(other.split())
    return one == other or checker.right(dataclasses.replace(problem, answer=one), other)
