"""Responses of a model to problems: several of each, a JSON line each, continued where a killed run has stopped."""

import dataclasses
import hashlib
import itertools
import json
import os
import time
from collections import Counter
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
from research.parallel import hosts


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
    arguments, it leaves what it would have left: a batch depends on the plan and on its place alone. So do several
    processes: each draws a batch at a time, and the first writes them all. Returns what was done now: {`samples`,
    `tokens`, `seconds`, `tokens_per_second`, `drafted`, `accepted`}, the seconds without compilation, the drafts with
    those beyond the end of a text. Raises RequestError for a problem that the model cannot take, and for a file with
    other problems' samples, or of another record.
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
    size = plan.batch_size

    def begin() -> int:
        done = _continued(path, wanted)
        made.continued(path, record)
        return done

    def drawn(start: int) -> dict[str, Any]:
        """The lines that the batch from `start` on still lacks, and what they took."""
        batch = wanted[start:start + size]
        padded = batch + batch[-1:] * (size - len(batch))  # another number of rows is compiled anew
        began = time.perf_counter()
        found = decoder.generate([prompts[problem.digest] for problem, _ in padded], plan.max_tokens, plan.sampling,
                                 plan.draft_tokens, seed=_seed(plan.seed, start), ends=tokenizer.end_ids)
        seconds = time.perf_counter() - began - found.compile_seconds
        lines = [Sample(problem.digest.hex(), number, tokenizer.decode(row), len(row), row[-1] in tokenizer.end_ids)
                 for (problem, number), row in zip(batch, found.tokens, strict=False)][max(done - start, 0):]
        return {"lines": [*map(dataclasses.asdict, lines)], "tokens": sum(line.tokens for line in lines),
                "seconds": seconds, "drafted": found.drafted, "accepted": sum(found.accepted)}

    hosts.agree({"problems": hashlib.blake2b(b"".join(prompts)).hexdigest(), "weights": record.get("weights")}, "task")
    done, (place, processes) = hosts.from_first(begin), hosts.place()
    missing = [start for start in range(0, len(wanted), size) if done < min(start + size, len(wanted))]
    sums: Counter = Counter()
    for starts in itertools.batched(missing, processes):  # one for each process
        told = hosts.from_all(drawn(starts[place]) if place < len(starts) else {})[:len(starts)]
        if hosts.is_first():
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for one in told for line in one["lines"])
                file.flush()
                os.fsync(file.fileno())
        sums.update({name: sum(one[name] for one in told) for name in ("tokens", "drafted", "accepted")})
        sums.update(samples=sum(len(one["lines"]) for one in told), seconds=max(one["seconds"] for one in told))
    found = {name: sums[name] for name in ("samples", "tokens", "seconds", "drafted", "accepted")}
    return found | {"tokens_per_second": found["tokens"] / max(found["seconds"], 1e-9)}


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
