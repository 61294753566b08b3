"""Weights between a Hugging Face folder and a workdir: `python -m research.convert --source=A --destination=B`.

The direction is read off from A: a workdir holds checkpoints/ (its newest intact one is taken), a Hugging Face folder
*.safetensors. Every tensor stays as it is stored, FP8 blocks and their scales included, unless --quantize or --dtype
say otherwise. B must not exist; it is written as .B.partial beside it, and the same command goes on where one was
stopped.
"""

import time
from pathlib import Path

from absl import flags

from research import command
from research.errors import RequestError, nearest

FLAGS = flags.FlagValues()
_SOURCE = flags.DEFINE_string("source", None, "A Hugging Face folder, or a workdir.", FLAGS)
_DESTINATION = flags.DEFINE_string("destination", None, "The workdir, or Hugging Face folder, to write.", FLAGS)
_QUANTIZE = flags.DEFINE_string(
    "quantize", None, "fp8_blocks: projections in E4M3 blocks of 128x128, as the release has them (those that are FP8 "
    "already are left untouched); none: dequantised, to float32 unless --dtype says otherwise.", FLAGS)
_DTYPE = flags.DEFINE_string(
    "dtype", None, "bfloat16 or float32: of every float tensor that is not in FP8 blocks; routing biases and scales "
    "stay as they are.", FLAGS)
_PLAN = flags.DEFINE_bool(
    "plan", False, "Write nothing: print what a conversion moves, --source being an experiment FILE.py.", FLAGS)
CHOICES = {"quantize": ("fp8_blocks", "none"), "dtype": ("bfloat16", "float32")}


def main() -> None:
    for flag in (_SOURCE, *(() if _PLAN.value else (_DESTINATION,))):
        if not flag.value:
            raise RequestError(f"--{flag.name} is required")
    for flag in (_QUANTIZE, _DTYPE):
        known = CHOICES[flag.name]
        if flag.value is not None and flag.value not in known:
            raise RequestError(f"--{flag.name}={flag.value!r} must be one of {', '.join(known)}"
                               f"{nearest(flag.value, known)}")
    if _PLAN.value:
        with command.stops_held():
            from research.interop.plan import plan

        print(plan(Path(_SOURCE.value), _QUANTIZE.value, _DTYPE.value))
        return
    source, destination = (Path(flag.value).expanduser() for flag in (_SOURCE, _DESTINATION))
    with command.stops_held():  # after the checks: JAX takes a second to import
        from research.interop.exporter import export_workdir
        from research.interop.importer import import_folder
    try:
        convert = export_workdir if (source / "checkpoints").is_dir() else import_folder
    except OSError as error:
        raise RequestError(f"--source={str(source)!r} cannot be read: {error.strerror}") from None
    start = time.perf_counter()
    account = convert(source, destination, _QUANTIZE.value, _DTYPE.value)
    print(closing_line(account, time.perf_counter() - start))


def closing_line(account, seconds: float) -> str:
    """What was moved, how fast, and how much memory it took at most."""
    return (f"{account.tensors:,} tensors, {account.read:,} bytes read, {account.written:,} written in {seconds:.1f} s "
            f"({account.read / seconds / 1e6:,.0f} MB/s); peak memory {peak_memory() / 2**20:,.0f} MiB")


def peak_memory() -> int:
    """Bytes of this process's largest resident set."""
    try:  # getrusage counts what the process was before exec, too
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    except (OSError, StopIteration):
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    command.run(main, FLAGS)
