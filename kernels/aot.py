"""Compiles every kernel for an H200 without one: `python -m kernels.aot`, by hand, in the environment of `make aot`.

Reports registers, spills, shared memory and seconds at every real shape with the tiles that would run there, and leaves
them in kernels/aot_result.json. Fails, with names, where a kernel does not compile or spills registers, and where a
product has no FP8 warpgroup instruction. `compile_for_h200` does the same for any function.
"""

import contextlib
import functools
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from absl import flags

from kernels import command, record
from kernels.command import RequestError, RunError

RESULT = record.FOLDER / "aot_result.json"
TARGET = record.FOLDER / "h200.txtpb"
FP8_INSTRUCTION = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m\d+n\d+k32\.f32\.e4m3\.e4m3")

FLAGS = flags.FlagValues()
_OP = flags.DEFINE_string("op", None, "Only this operation; the result's file stays as it is.", FLAGS)


class Unavailable(RuntimeError):
    """This environment cannot compile for a GPU: one line that says what is missing."""


class Kernel(NamedTuple):
    """What ptxas said of one kernel."""

    registers: int
    spill_bytes: int  # stores and loads
    shared_bytes: int
    fp8_instructions: int


def h200s(n: int):
    """n H200 that are not there, eight to a node, to compile for. Unavailable without the packages of
    requirements-gpu.txt."""
    import jax
    from jax._src import xla_bridge
    from jax.experimental import topologies

    jax.devices()  # before the plugins: the CPU stays the default
    a_node = math.gcd(n, 8)
    with _quiet():
        with contextlib.suppress(Exception):  # whether the plugin came in is seen below
            xla_bridge.discover_pjrt_plugins()
        try:
            topology = topologies.get_topology_desc(platform="cuda", topology_name="",
                                                    target_config=TARGET.read_text(),
                                                    topology=f"1x{n // a_node}x{a_node}")
        except Exception as error:
            raise Unavailable(
                "no CUDA compiler here: `make aot` makes an environment with jax[cuda13] (requirements-gpu.txt); "
                f"jax says: {str(error).splitlines()[0]}") from error
    return topology.devices


@functools.cache
def _h200():
    """The sharding of arrays on one H200 that is not there. Unavailable as from `h200s`."""
    import jax

    mesh = jax.sharding.Mesh(h200s(1), ("x",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def on_h200(arguments):
    """Their shapes and dtypes, as they would lie on that H200; Unavailable as from `_h200`."""
    import jax

    sharding = _h200()
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)


def compile_for_h200(function: Callable, *arguments):
    """`function`, jitted or not, compiled for one H200 at these arguments (pytrees of arrays or ShapeDtypeStructs).

    The result's `memory_analysis()` counts the bytes of arguments, outputs and temporaries on that GPU, `as_text()` is
    the optimised HLO. The function is traced under an abstract mesh whose device is the H200; `jax.default_backend()`
    tells it of this process's own, a CPU. Unavailable without the packages of requirements-gpu.txt.
    """
    import jax

    from kernels.choice import meant_for_h200

    arguments = on_h200(arguments)
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    with meant_for_h200():
        return jitted.lower(*arguments).compile()


def kernels_of(function: Callable, *arguments) -> list[Kernel]:
    """The Mosaic kernels of `function`, compiled as by `compile_for_h200`."""
    with tempfile.TemporaryDirectory() as folder, _environment("MOSAIC_GPU_DUMP_TO", folder), _quiet():
        compile_for_h200(function, *arguments)
        return [_read(path) for path in sorted(Path(folder).glob("*.ptxas"))]


def _read(ptxas: Path) -> Kernel:
    said, ptx = ptxas.read_text(), ptxas.with_suffix(".ptx").read_text()
    resources = ptxas.with_suffix(".resources.txt").read_text()
    return Kernel(
        registers=max(int(n) for n in re.findall(r"Used (\d+) registers", said)),
        spill_bytes=sum(int(n) for n in re.findall(r"(\d+) bytes spill", said)),
        shared_bytes=int(re.search(r"smem_scratch_bytes=(\d+)", resources)[1]),
        fp8_instructions=len(FP8_INSTRUCTION.findall(ptx)))


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on the process's stderr: the plugin misses a GPU, the dump a disassembler, and both say so."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def defects(operation, kernels: list[Kernel]) -> list[str]:
    """What must not be in a compiled operation."""
    found = []
    if not kernels:
        found.append("has no Mosaic kernel")
    if spilled := sum(kernel.spill_bytes for kernel in kernels):
        found.append(f"spills {spilled} bytes of registers")
    if operation.warpgroup_fp8 and not any(kernel.fp8_instructions for kernel in kernels):
        found.append("has no FP8 warpgroup instruction (wgmma ... e4m3.e4m3) in its PTX")
    return found


def examine(operation, shape) -> tuple[dict, list[str]]:
    """One row of the result, and the defects of this operation at this shape."""
    import jax

    tiles = operation.chosen(shape)
    row = {"operation": operation.name, "shape": record.key_of(shape), "tiles": record.fields(tiles)}
    arguments = jax.eval_shape(functools.partial(operation.arguments, shape), jax.random.key(0))
    start = time.perf_counter()
    try:
        kernels = kernels_of(operation.mosaic(shape, tiles), *arguments)
    except Unavailable:
        raise
    except Exception as error:  # whatever the compiler refuses with is a line of the report
        return row, [f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[:300]}"]
    row["seconds"] = round(time.perf_counter() - start, 2)
    row["kernels"] = [kernel._asdict() for kernel in kernels]
    return row, defects(operation, kernels)


def main() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    from kernels.operations import OPERATIONS

    chosen = OPERATIONS if _OP.value is None else {_OP.value: OPERATIONS[command.one_of("op", _OP.value, OPERATIONS)]}
    try:
        _h200()
    except Unavailable as error:
        raise RequestError(str(error)) from None
    print(f"{'operation':<25}{'shape':<20}{'registers':>10}{'spills':>8}{'shared':>9}{'wgmma':>7}{'seconds':>9}  tiles")
    rows, failures = [], []
    for operation in chosen.values():
        for shape in operation.shapes:
            row, found = examine(operation, shape)
            rows.append(row | {"defects": found})
            failures += [f"{operation.name} {record.key_of(shape)} {defect}" for defect in found]
            print(_line(row, found), flush=True)
    if _OP.value is None:
        about = {"target": "NVIDIA H200, sm_90a", "date": record.now(), "commit": record.commit(),
                 "code": record.code(), "versions": record.versions("jax", "jaxlib", "jax-cuda13-pjrt",
                                                                    "nvidia-cuda-nvcc")}
        record.write_json(RESULT, about | {"failures": failures, "results": rows})
        print(f"written to kernels/{RESULT.name}")
    if failures:
        raise RunError(f"{len(failures)} of {len(rows)} fail: {'; '.join(failures)}")


def _line(row: dict, found: list[str]) -> str:
    kernels = row.get("kernels", [])
    numbers = [max((kernel[field] for kernel in kernels), default="-") for field in Kernel._fields]
    columns = [str(n).rjust(width) for n, width in zip(numbers, (10, 8, 9, 7), strict=True)]
    tiles = " ".join(f"{name}={value}" for name, value in row["tiles"].items())
    return "".join((f"{row['operation']:<25}{row['shape']:<20}", *columns,
                    f"{row.get('seconds', '-'):>9}  {tiles}", *(f"\n    {defect}" for defect in found)))


if __name__ == "__main__":
    command.run(main, FLAGS)
