"""Times every kernel at DeepSeek-V3's shapes: `python -m kernels.bench [--op=NAME] [--json=FILE] [--search] [--peer]`.

Beside each kernel: what plain XLA and a bfloat16 product take in the same run, and a bound, the larger of its bytes
over the copy bandwidth measured here and its FLOPs over the peak. Random data, inputs that the L2 does not hold, no
dispatch in the times; what a kernel computes is compared with plain XLA's results first. Without a Hopper GPU small
shapes run, so that the command can be tried: a CPU's numbers say nothing about the kernels.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from kernels import command, record
from kernels.command import RequestError, RunError
from kernels.results import Results

FLAGS = flags.FlagValues()
_OP = flags.DEFINE_string("op", None, "Only this operation.", FLAGS)
_JSON = flags.DEFINE_string("json", None, "Writes results here as they come; what already stands there, of the same "
                            "sources, JAX and device, is not measured again.", FLAGS)
_AGAIN = flags.DEFINE_bool("again", False, "Measures what --json already holds, too.", FLAGS)
_SEARCH = flags.DEFINE_bool("search", False, "Tries the candidate tiles of each kernel and keeps the best in "
                            "kernels/tuned/.", FLAGS)
_PEER = flags.DEFINE_bool("peer", False, "Also cuBLASLt's block-scaled product, through torch.", FLAGS)
_PEER_PYTHON = flags.DEFINE_string("peer_python", sys.executable, "The Python that has torch with CUDA.", FLAGS)
_MINUTES = flags.DEFINE_float("minutes", None, "Ends after so many, failing when something is left: run it again.",
                              0, None, FLAGS)

COLUMNS = (("operation", 25), ("shape", 20), ("by", 10), ("us", 10), ("range", 19), ("TFLOP/s", 9), ("GB/s", 8),
           ("x bf16", 8), ("x XLA", 8), ("of bound", 10))


def main() -> None:
    results = Results(_JSON.value)
    if _PEER.value and shutil.which(_PEER_PYTHON.value) is None:
        raise RequestError(f"--peer_python={_PEER_PYTHON.value!r} does not run")
    start = time.perf_counter()
    from kernels.operations import OPERATIONS

    chosen = list(OPERATIONS.values())
    if _OP.value is not None:
        chosen = [OPERATIONS[command.one_of("op", _OP.value, OPERATIONS)]]

    from kernels import comparison

    machine = comparison.Machine()
    if _SEARCH.value and machine.refusal:
        raise RequestError(f"--search times tiles on a Hopper GPU, but {machine.refusal}")
    results.identify(machine.name)
    print(heading(machine), flush=True)
    longest, left, made = 0.0, 0, {}
    for search in (False, True) if _SEARCH.value else (False,):  # a search takes long: first what there is
        for operation in chosen:
            for shape in [operation.small] if machine.refusal else operation.shapes:
                before, key = time.perf_counter(), (operation.name, record.key_of(shape))
                kept = None if _AGAIN.value and search == _SEARCH.value else results.find(*key)
                if kept is not None and kept["searched"] >= search:
                    made[key] = kept
                    if search == _SEARCH.value:
                        for name in kept["implementations"]:
                            show(kept, name)
                elif _MINUTES.value is not None and before - start + longest > 60 * _MINUTES.value:
                    left += 1
                else:
                    made[key] = comparison.compare(operation, shape, machine, results, search, show)
                    longest = max(longest, time.perf_counter() - before)
    if _PEER.value:
        peer(chosen, machine, results)
    failures = [f"{one['operation']} {one['shape']} {name}: {row['failed']}" for one in made.values()
                for name, row in one["implementations"].items() if "failed" in row]
    if failures:
        raise RunError(f"{len(failures)} failed: {'; '.join(failures)}")
    if left:
        raise RunError(f"--minutes={_MINUTES.value:g} are over with {left} shapes left: run it again to go on")


def peer(operations, machine, results: Results) -> None:
    """Adds cuBLASLt's rows to the records of the operations that it has; says why where it cannot."""
    from kernels import comparison, timing

    if machine.refusal:
        print("cublaslt: not run: it needs a Hopper GPU")
        return
    waiting = []
    for operation in operations:
        for shape in operation.shapes if operation.peer else ():
            made = results.find(operation.name, record.key_of(shape))
            if made is not None and (_AGAIN.value or "cublaslt" not in made["implementations"]):
                waiting.append((operation, shape, made))
    if not waiting:
        return
    request = machine.careful._asdict() | {
        "l2_bytes": timing.L2_BYTES, "shapes": [operation.peer(shape) for operation, shape, _ in waiting]}
    script = [_PEER_PYTHON.value, str(Path(__file__).with_name("bench_peer.py")), json.dumps(request)]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}  # the modules beside the script are none of torch's
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True, env=environment) as process:
        about = json.loads(process.stdout.readline() or '{"missing": "its process ended at once"}')
        if "missing" in about:
            print(f"cublaslt: not run: {about['missing']}", flush=True)
            return
        print(f"cublaslt: {about['name']}", flush=True)
        for (operation, shape, made), said in zip(waiting, process.stdout, strict=False):
            row = json.loads(said)
            if "failed" not in row:
                row = comparison.rates(operation, shape, timing.Seconds(**row))
            made["implementations"]["cublaslt"] = row
            results.keep(made)
            show(made, "cublaslt")


def heading(machine) -> str:
    """What the numbers below depend on."""
    packages = " ".join(f"{name} {version}" for name, version in record.versions("jax", "jaxlib").items())
    peak = f"{machine.peak / 1e12:,.0f} TFLOP/s in FP8 by its data sheet" if machine.peak else "peak unknown"
    lines = [f"{machine.name}, {packages}, {record.now()}, commit {record.commit()}: copies at "
             f"{machine.bandwidth / 1e9:,.0f} GB/s, {peak}"]
    if machine.refusal:
        lines.append(f"{machine.refusal}: small shapes, no kernels. These numbers say nothing about the kernels.")
    return "\n".join((*lines, _line([name for name, _ in COLUMNS])))


def show(result: dict, name: str) -> None:
    """Prints one row of the table."""
    rows = result["implementations"]
    row = rows[name]
    cells = [result["operation"], result["shape"], name]
    if "us" in row:
        cells += [f"{row['us']:,.1f}", "-".join(f"{us:,.1f}" for us in row["us_range"]),
                  _digits(row["tflops"]) if row["tflops"] else "", _digits(row["gbytes"]),
                  _times(rows, "bfloat16", name), _times(rows, "xla", name)]
        cells += [f"{result['bound_us'] / row['us']:.2f}"] if name != "bfloat16" else []  # the bound is of 8 bits
    tail = [f"{field}={value}" for field, value in row.get("tiles", {}).items()]
    print(_line(cells), *tail, *([row["failed"]] if "failed" in row else []), flush=True)


def _digits(rate: float) -> str:
    """Three digits, or all before the point."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _line(cells: list[str]) -> str:
    return "".join(cell.ljust(n) if i < 3 else cell.rjust(n)
                   for i, (cell, (_, n)) in enumerate(zip(cells, COLUMNS, strict=False))).rstrip()


def _times(rows: dict, other: str, name: str) -> str:
    """How many times as fast as one that was measured before it."""
    before = list(rows)[:list(rows).index(name)]
    return f"{rows[other]['us'] / rows[name]['us']:.2f}" if other in before and "us" in rows[other] else ""


if __name__ == "__main__":
    command.run(main, FLAGS)
