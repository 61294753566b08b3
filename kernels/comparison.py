"""One operation at one shape: the kernel beside plain XLA and bfloat16, its tiles searched, its results compared."""

import contextlib
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels import choice, record, timing, tuned
from kernels.command import RunError
from kernels.operations import Operation
from kernels.results import Results

PEAKS = {  # FLOP/s of FP8 products without sparsity, by JAX's name of the device
    "NVIDIA H200": 1979e12,
    "NVIDIA H100 80GB HBM3": 1979e12,
    "NVIDIA H100 PCIe": 1513e12,
}


class Machine:
    """The default device and how fast it copies. refusal: why it cannot run the kernels; then small shapes run."""

    def __init__(self):
        device = jax.devices()[0]
        self.name = device.device_kind
        self.refusal = choice.gpu_refusal()
        if not bool(jnp.all(jnp.ones(4) + 1 == 2)) or abs(float(jnp.sqrt(512.0)) - 512**0.5) > 1e-5:
            raise RunError(f"{self.name} computes sqrt(512) or 1 + 1 wrongly: this JAX and its driver do not fit")
        self.careful, self.quick = (timing.ROUGH, timing.ROUGH) if self.refusal else (timing.CAREFUL, timing.QUICK)
        self.bandwidth = timing.copy_bandwidth(2**22 if self.refusal else 2**30, self.careful)
        self.peak = PEAKS.get(self.name)

    def bound(self, operation: Operation, shape) -> float:
        """Seconds that no implementation can beat: its bytes at the copy's rate, its FLOPs at the peak."""
        peak = self.peak and self.peak * 8 / operation.bits
        return max(operation.traffic(shape) / self.bandwidth, operation.flops(shape) / peak if peak else 0.0)

    def inputs(self, operation: Operation, shape, arguments: Callable) -> list[tuple]:
        """Sets of random arrays, as many as the timing cycles through."""
        n = 2 if self.refusal else timing.copies_of(operation.traffic(shape), self.bound(operation, shape))
        make = jax.jit(functools.partial(arguments, shape))
        return [make(jax.random.key(i, impl="rbg")) for i in range(n)]  # the default one compiles for seconds


def compare(operation: Operation, shape, machine: Machine, results: Results, search: bool, show: Callable) -> dict:
    """Times every implementation, calling show(record, name) after each. Returns the record, kept in `results`."""
    rows = {}
    made = {"operation": operation.name, "shape": record.key_of(shape), "searched": search,
            "copy_gbytes": machine.bandwidth / 1e9, "bound_us": 1e6 * machine.bound(operation, shape),
            "implementations": rows}

    def add(name, row):
        rows[name] = row
        show(made, name)

    one = Comparison(operation, shape, machine, results)
    if operation.bfloat16 is not None:
        inputs = machine.inputs(operation, shape, operation.bfloat16_arguments)
        add("bfloat16", one.row("bfloat16", inputs))
        del inputs  # the next ones need the memory
    one.inputs = machine.inputs(operation, shape, operation.arguments)
    add("xla", one.row("xla", one.inputs))
    if machine.refusal is None:
        tiles = operation.chosen(shape)
        if search:
            tiles, made["tried"] = one.search(tiles)
        add("mosaic", one.mosaic(tiles, machine.careful))
    results.keep(made)
    return made


class Comparison:
    """What the rows of one shape share. expected: plain XLA's results on the first inputs, where it has any."""

    def __init__(self, operation: Operation, shape, machine: Machine, results: Results):
        self.operation, self.shape, self.machine, self.results = operation, shape, machine, results
        self.inputs, self.expected = [], None

    def timed(self, function: Callable, inputs: list[tuple], effort: timing.Effort) -> timing.Timed:
        return timing.Timed(function, inputs, self.machine.bound(self.operation, self.shape), effort)

    def row(self, name: str, inputs: list[tuple]) -> dict:
        """Times and rates of `xla`, whose results are the expected ones, or of `bfloat16`.

        {"failed": why} of what does not compile or run.
        """
        try:
            timed = self.timed(getattr(self.operation, name)(self.shape), inputs, self.machine.careful)
            self.expected = timed.results() if name == "xla" else None
            return rates(self.operation, self.shape, timed.measure(), name)
        except Exception as error:  # whatever refuses, compiler or device, is a line of the table
            _must_live(self.operation.name, error)
            return {"failed": _short(error)}

    def mosaic(self, tiles, effort: timing.Effort) -> dict:
        """The kernel's row with these tiles; failed, too, where its results are not the expected ones."""
        fields = {"tiles": record.fields(tiles)}
        what = f"{self.operation.name} {record.key_of(self.shape)} {json.dumps(fields)}"
        if self.results.lost(what):
            return fields | {"failed": "did not come back the last time"}
        with self.results.attempt(what):
            try:
                timed = self.timed(self.operation.mosaic(self.shape, tiles), self.inputs, effort)
                if self.expected is not None:
                    fields["error"] = relative_error(timed.results(), self.expected)
                    if not fields["error"] <= self.operation.tolerance:
                        return fields | {"failed": f"its results differ from plain XLA's by {fields['error']:.2g}"}
                return fields | rates(self.operation, self.shape, timed.measure())
            except Exception as error:
                _must_live(what, error)
                return fields | {"failed": _short(error)}

    def search(self, tiles) -> tuple[Any, list[dict]]:
        """The fastest of `tiles` and the candidates, written to kernels/tuned/, and what was tried."""
        tried, best, least = [], tiles, float("inf")
        for candidate in [tiles, *(c for c in self.operation.candidates(self.shape) if c != tiles)]:
            row = self.mosaic(candidate, self.machine.quick)
            tried.append(row)
            if row.get("us", float("inf")) < least:
                best, least = candidate, row["us"]
        if least < float("inf"):
            tuned.write(self.machine.name, self.operation.name, self.shape, record.fields(best))
        return best, tried


def rates(operation: Operation, shape, seconds: timing.Seconds, name: str = "xla") -> dict:
    """A row of what was measured. name: whose bytes were moved, see `Operation.traffic`."""
    return {
        "us": 1e6 * seconds.median, "us_range": [1e6 * seconds.least, 1e6 * seconds.greatest],
        "samples": seconds.samples, "calls_a_sample": seconds.calls,
        "tflops": operation.flops(shape) / seconds.median / 1e12,
        "gbytes": operation.traffic(shape, name) / seconds.median / 1e9}


def relative_error(results, expected) -> float:
    """The largest, over the arrays of both, of |result - expected| / |expected| in Frobenius' norm; inf for a NaN.

    0 only for the same bits.
    """
    return max(float(e) if e == e else float("inf") for e in jax.tree.leaves(_relative_errors(results, expected)))


@jax.jit
def _relative_errors(results, expected):
    def one(a, b):
        bits = [jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}") for x in (a, b)]
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        error = jnp.linalg.norm((a - b).ravel()) / jnp.maximum(jnp.linalg.norm(b.ravel()), 1e-30)
        return jnp.where(jnp.array_equal(*bits), 0.0, jnp.maximum(error, 1e-30))

    return jax.tree.map(one, results, expected)


def _must_live(what: str, error: Exception) -> None:
    """RunError when the device went down with what it ran: nothing more runs in this process."""
    with contextlib.suppress(Exception):
        jax.block_until_ready(jnp.ones(4) + 1)
        return
    raise RunError(f"{what} took the GPU down ({_short(error)}): what was measured is kept, run it again") from error


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
