"""Responses of a model to problems: several of each, a JSON line each, continued where a killed run has stopped."""

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.decoding.generate import Decoder, check_request
from research.decoding.sampling import Sampling
from research.distillation import made
from research.distillation.tasks import Problem
from research.distillation.template import Template
from research.errors import RequestError


@dataclasses.dataclass(frozen=True)
class Sample:
    """One line. problem: hexadecimal digest of the question; number: from 0 among the problem's samples; text: the
    response, after the prompt's `<think>`; tokens: of it, an end of text included; ended: whether that came."""

    problem: str
    number: int
    text: str
    tokens: int
    ended: bool


_TYPES = {str: "text", int: "a whole number", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How problems are sampled: `samples` of each, `batch_size` responses at a time, of `max_tokens` at the most;
    `draft_tokens`: as Decoder.generate."""

    samples: int
    batch_size: int
    max_tokens: int
    sampling: Sampling
    seed: int
    draft_tokens: int


def sample(path: Path, problems: Sequence[Problem], decoder: Decoder, tokenizer, first: Sequence[int],
           template: Template, plan: Plan, record: Mapping[str, Any]) -> dict[str, float]:
    """Writes to `path` the samples that it lacks, in the problems' order. first: the ids that every prompt begins with.
    record: what they are made with, for `made.continued`.

    A line is whole or absent, and on the disk when its batch is done. Killed and called again, with the same
    arguments, it leaves what it would have left: a batch depends on the plan and on its place alone. Returns what was
    done now: {`samples`, `tokens`, `seconds`, `tokens_per_second`, `drafted`, `accepted`}, the seconds without
    compilation, the drafts with those beyond the end of a text. Raises RequestError for a problem that the model
    cannot take, and for a file with other problems' samples, or of another record.
    """
    if not problems:
        raise RequestError("there is no problem to sample")
    wanted = [(problem, number) for problem in problems for number in range(plan.samples)]
    prompts = {problem.digest: [*first, *tokenizer.encode(template.prompt(problem.question)).tolist()]
               for problem in problems}
    try:
        check_request(decoder.model, list(prompts.values()), plan.max_tokens, plan.draft_tokens)
    except ValueError as error:
        raise RequestError(f"config.sampling: {error}") from None
    done = _continued(path, wanted)
    made.continued(path, record)
    written, tokens, seconds, drafted, accepted = 0, 0, 0.0, 0, 0
    with path.open("a", encoding="utf-8") as file:
        for start in range(0, len(wanted), plan.batch_size):
            if done >= min(start + plan.batch_size, len(wanted)):
                continue
            batch = wanted[start:start + plan.batch_size]
            padded = batch + batch[-1:] * (plan.batch_size - len(batch))  # another number of rows is compiled anew
            began = time.perf_counter()
            found = decoder.generate([prompts[problem.digest] for problem, _ in padded], plan.max_tokens, plan.sampling,
                                     plan.draft_tokens, seed=_seed(plan.seed, start), ends=tokenizer.end_ids)
            seconds += time.perf_counter() - began - found.compile_seconds
            drafted, accepted = drafted + found.drafted, accepted + sum(found.accepted)
            for place, ((problem, number), row) in enumerate(zip(batch, found.tokens, strict=False), start=start):
                if place < done:
                    continue
                ended = row[-1] in tokenizer.end_ids
                line = Sample(problem.digest.hex(), number, tokenizer.decode(row), len(row), ended)
                file.write(json.dumps(dataclasses.asdict(line), ensure_ascii=False) + "\n")
                written, tokens = written + 1, tokens + len(row)
            file.flush()
            os.fsync(file.fileno())
    return {"samples": written, "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / max(seconds, 1e-9),
            "drafted": drafted, "accepted": accepted}


def drafting(found: dict) -> str:
    """What came of drafts, to be added to a line about what `sample` has done; nothing where there were none."""
    return f", {found['accepted'] / found['drafted']:.1%} of drafts accepted" if found.get("drafted") else ""


def read(path: Path) -> list[Sample]:
    """The samples of a file. Raises RequestError where it is missing, empty, or has a line that is no sample."""
    found = list(_lines(path))
    if not found:
        raise RequestError(f"{path} holds no sample")
    return found


def _lines(path: Path) -> Iterator[Sample]:
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    for count, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON leaves other line ends in strings
        if not line:
            continue
        try:
            found = Sample(**json.loads(line))
        except (ValueError, TypeError):
            raise RequestError(f"{path}:{count} is no sample: expected an object with "
                               f"{', '.join(field.name for field in dataclasses.fields(Sample))}") from None
        for field in dataclasses.fields(Sample):
            value = getattr(found, field.name)
            if type(value) is not field.type:
                raise RequestError(f"{path}:{count} is no sample: its {field.name} is {json.dumps(value)}, expected "
                                   f"{_TYPES[field.type]}")
        yield found


def _continued(path: Path, wanted: Sequence[tuple[Problem, int]]) -> int:
    """How many of the wanted samples stand in the file, which is cut behind its last whole line."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    found = list(_lines(path))
    for count, (line, (problem, number)) in enumerate(zip(found, wanted, strict=False), start=1):
        if (line.problem, line.number) != (problem.digest.hex(), number):
            raise RequestError(f"{path}:{count} is sample {line.number} of another problem than {problem.name}: the "
                               "task or the number of samples has changed; remove the file to begin anew")
    if len(found) > len(wanted):
        raise RequestError(f"{path} holds {len(found)} samples where {len(wanted)} are asked for: the task or the "
                           "number of samples has changed; remove the file to begin anew")
    return len(found)


def _seed(seed: int, start: int) -> int:
    return int(np.random.SeedSequence([seed, start]).generate_state(1)[0]) & 0x7FFFFFFF
