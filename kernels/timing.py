"""Seconds of a function on the device: many calls in one compiled loop, over inputs that the L2 cannot hold."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

L2_BYTES = 50 * 2**20  # an H200's, the largest of the Hoppers


class Effort(NamedTuple):
    """How much of it: seconds of warm-up (a cool GPU clocks higher than one at work), samples, seconds in each."""

    warmup: float
    samples: int
    sample: float
    most: float  # seconds of samples: what is slow gets fewer of them, three at least


CAREFUL = Effort(0.3, 20, 0.02, 2.0)
QUICK = Effort(0.1, 5, 0.01, 0.5)
ROUGH = Effort(0.0, 3, 0.0, 0.5)  # on a CPU, whose numbers say nothing about the kernels


class Seconds(NamedTuple):
    """Of one call: the median, least and greatest of the samples, each an average over `calls`."""

    median: float
    least: float
    greatest: float
    samples: int
    calls: int


def copies_of(bytes_of_call: float, seconds_of_call: float) -> int:
    """How many sets of inputs a loop's body cycles through.

    Enough that more than twice the L2 passes before a set comes again, and that the loop's own three kernels, each of
    a microsecond or two for every turn, are 1% or so.
    """
    cold = math.ceil(2 * L2_BYTES / bytes_of_call) + 1
    return max(cold, min(16, math.ceil(4e-4 / seconds_of_call)))


def loop(function: Callable, argument_sets: list[tuple], turns: int) -> Callable[[list[tuple]], Any]:
    """A jittable function that calls `function` on each set, `turns` times over, and returns the last results."""
    def run(argument_sets):
        def turn(_, carry):
            # bound to what the turn before gave: XLA would compute calls that do not depend on it only once
            argument_sets_now, chain = lax.optimization_barrier((argument_sets, carry[1]))
            results = [function(*arguments) for arguments in argument_sets_now]
            last = jax.tree.leaves(results[-1])[-1]
            return results, chain + lax.slice(last.ravel(), (0,), (1,)).astype(jnp.float32)

        like = jax.eval_shape(lambda sets: [function(*arguments) for arguments in sets], argument_sets)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        return lax.fori_loop(0, turns, turn, (zeros, jnp.zeros(1)))

    return run


class Timed:
    """A function compiled for timing. expected: roughly the seconds of a call; the truth may be far above it."""

    def __init__(self, function: Callable, argument_sets: list[tuple], expected: float, effort: Effort):
        n = len(argument_sets)
        turns = max(1, math.ceil(effort.sample / (expected * n)))
        self.argument_sets, self.effort, self.calls = argument_sets, effort, turns * n
        self.run = jax.jit(loop(function, argument_sets, turns)).lower(argument_sets).compile()

    def results(self) -> Any:
        """What the function gives for the first set."""
        return jax.block_until_ready(self.run(self.argument_sets)[0][0])

    def measure(self) -> Seconds:
        """Runs it for a while, then takes samples."""
        start = time.perf_counter()
        while True:
            jax.block_until_ready(self.run(self.argument_sets))
            if time.perf_counter() - start >= self.effort.warmup:
                break
        taken, start = [], time.perf_counter()
        while len(taken) < self.effort.samples and (len(taken) < 3 or time.perf_counter() - start < self.effort.most):
            before = time.perf_counter()
            jax.block_until_ready(self.run(self.argument_sets))
            taken.append((time.perf_counter() - before) / self.calls)
        return Seconds(statistics.median(taken), min(taken), max(taken), len(taken), self.calls)


def copy_bandwidth(size: int, effort: Effort) -> float:
    """Bytes a second of reading `size` bytes and writing as many, the best that any kernel of this kind can do."""
    x = jax.random.bits(jax.random.key(0), (size // 4,), jnp.uint32)
    return 2 * size / Timed(lambda x: x ^ 1, [(x,)], 2 * size / 4e12, effort).measure().median
