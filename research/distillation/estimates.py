"""What a few samples of each problem say about a model: pass@1 with its interval, pass@k, and majority votes."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_Z = 1.959964  # of 95%


class Estimate(NamedTuple):
    """A share from 0 to 1 and its 95% interval."""

    value: float
    low: float
    high: float


def pass_at_1(right: Sequence[Sequence[bool]]) -> Estimate:
    """Mean over problems of the share of right samples (R1 §3), and its interval over problems and samples.

    right: a list for each problem, all with at least one sample. The samples of a problem hang together: the interval
    is Wilson's for as many independent samples as would give the variance seen between problems, from one a problem
    (also taken where all samples are right, or none) to all of them. ValueError for no problem, or one of no sample.
    """
    if not all(map(len, right)) or not len(right):
        raise ValueError("pass@1 needs at least one problem, and a sample of each")
    rates = np.array([np.mean(row) for row in right])
    problems, mean = len(rates), float(np.mean(rates))
    spread = mean * (1 - mean)
    number = float(problems)
    if spread and problems > 1:
        variance = float(np.var(rates, ddof=1)) / problems
        samples = float(sum(map(len, right)))
        number = min(max(spread / variance, problems), samples) if variance else samples
    middle = (mean + _Z**2 / (2 * number)) / (1 + _Z**2 / number)
    half = _Z / (1 + _Z**2 / number) * math.sqrt(spread / number + _Z**2 / (4 * number**2))
    return Estimate(mean, max(0.0, middle - half), min(1.0, middle + half))


def pass_at_k(right: Sequence[Sequence[bool]], k: int) -> float:
    """Mean over problems of the chance that k of their samples, drawn without replacement, hold a right one.

    1 - C(n-c, k) / C(n, k) for c right ones of n: unbiased (Chen et al. 2021, Eq. 1), where 1 - (1 - c/n)^k is not.
    ValueError where a problem has fewer than k samples.
    """
    _check(right, k)
    return float(np.mean([1 - math.comb(len(row) - sum(row), k) / math.comb(len(row), k) for row in right]))


def cons_at_k(answers: Sequence[Sequence[str | None]], right: Sequence[Sequence[bool]], k: int) -> float:
    """Share of problems whose most frequent answer among the first k samples is right.

    answers: equal ones spelt alike, None where there is none (it has no vote); right: of the same samples. Ties count
    by the share of tied answers that are right. ValueError where a problem has fewer than k samples.
    """
    _check(right, k)
    shares = []
    for row, verdicts in zip(answers, right, strict=True):
        votes = Counter(answer for answer in row[:k] if answer is not None)
        most = max(votes.values(), default=0)
        verdict = dict(zip(row[:k], verdicts[:k], strict=True))
        shares.append(np.mean([verdict[answer] for answer, count in votes.items() if count == most]) if most else 0.0)
    return float(np.mean(shares))


def _check(right: Sequence[Sequence[bool]], k: int) -> None:
    fewest = min(map(len, right), default=0)
    if not 1 <= k <= fewest:
        raise ValueError(f"k={k} must be from 1 to the samples of every problem, of which the fewest are {fewest}")
