"""How fast conversion is beside copying, and in how much memory: `python -m research.bench_convert --folder=DIR`.

Writes DIR/source, a Hugging Face folder in FP8 blocks of V2-Lite's shape (15.7B parameters, 16 GB; random values), then
takes the time of `cp -r` and sync, of the conversion to a workdir, and of the one back, in turn. Needs three times the
folder's size on the disk; everything is removed at the end unless --keep.
"""

import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from research import command, config, experiment
from research.bench_context import SHAPES
from research.errors import RequestError, RunError
from research.interop.names import repeats
from research.interop.plan import released
from research.interop.release import config_json
from research.interop.shards import Shards, entries_of, lay_out
from research.interop.tensors import DTYPES, FP8
from research.interop.transfer import row_blocks
from research.interop.variables import arrays_of

FLAGS = flags.FlagValues()
_FOLDER = flags.DEFINE_string("folder", None, "A new folder, on the disk to measure; with --keep one of before.", FLAGS)
_SHAPE = flags.DEFINE_enum("shape", "V2-Lite", list(SHAPES), "The model's shape.", FLAGS)
_ROUNDS = flags.DEFINE_integer("rounds", 1, "Copies and conversions in turn; 0 writes the source alone.",
                               flag_values=FLAGS)
_KEEP = flags.DEFINE_bool("keep", False, "Leave the folder, and use what is in it.", FLAGS)
POOL_BYTES = 2**26  # of random content that all tensors take their values from
SAID = re.compile(r"([\d,]+) tensors, ([\d,]+) bytes read, ([\d,]+) written in ([\d.]+) s .* peak memory ([\d,]+) MiB")


def main() -> None:
    if not _FOLDER.value:
        raise RequestError("--folder is required")
    folder = Path(_FOLDER.value).expanduser()
    source, copy, ours, again = (folder / name for name in ("source", "copy", "ours", "again"))
    if folder.exists() and not _KEEP.value:
        raise RequestError(f"--folder={folder} exists already")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not source.exists():
            write_source(source, _SHAPE.value)
        rows = []
        for _ in range(_ROUNDS.value):
            for path in (copy, ours, again):
                shutil.rmtree(path, ignore_errors=True)
            start = time.perf_counter()
            subprocess.run(["cp", "-r", source, copy], check=True)
            subprocess.run(["sync"], check=True)
            rows.append([("copy", time.perf_counter() - start, 0)])
            shutil.rmtree(copy)
            for name, one, other in (("to a workdir", source, ours), ("back", ours, again)):
                rows[-1].append((name, *convert(one, other)))
        if rows:
            report(source, rows)
    finally:
        if not _KEEP.value:
            shutil.rmtree(folder)


def convert(source: Path, destination: Path) -> tuple[float, int]:
    """Seconds of the whole command in a process of its own, and its peak memory in MiB."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "research.convert", f"--source={source}",
                           f"--destination={destination}"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RunError(f"the conversion of {source} failed")
    print(done.stdout, end="")
    return time.perf_counter() - start, int(SAID.search(done.stdout)[5].replace(",", ""))


def report(source: Path, rows: list[list[tuple[str, float, int]]]) -> None:
    size = sum(path.stat().st_size for path in source.iterdir())
    copied = statistics.median(row[0][1] for row in rows)
    for column in zip(*rows, strict=True):
        seconds, memory = [cell[1] for cell in column], max(cell[2] for cell in column)
        middle = statistics.median(seconds)
        beside = f"  {copied / middle:4.0%} of copying's speed  peak memory {memory:,} MiB" if memory else ""
        print(f"{column[0][0]:>12}  {middle:6.1f} s ({min(seconds):.1f}-{max(seconds):.1f})  "
              f"{size / middle / 1e6:6,.0f} MB/s{beside}")


def write_source(folder: Path, shape: str) -> None:
    """A Hugging Face folder in FP8 blocks, of random values; the same ones stand in many tensors."""
    file, changes = SHAPES[shape]
    settings = config.check(experiment.change(experiment.load(file), list(changes)))
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, POOL_BYTES, np.uint8)
    codes[codes & 0x7F == 0x7F] = 0  # NaN
    floats = random.normal(size=POOL_BYTES // 4).astype(np.float32) * np.float32(0.02)
    pools = {FP8: codes.view(DTYPES[FP8]), "F32": np.abs(floats), "BF16": floats.astype(DTYPES["BF16"])}
    arrays = arrays_of(settings)
    entries = list(entries_of(arrays, released(arrays), repeats(settings)))
    folder.mkdir()
    raw = config_json(settings, "BF16", True, None, None)
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    total = sum(entry.nbytes for entry in entries)
    with Shards(folder, lay_out(entries)) as shards, tqdm(total=total, unit="B", unit_scale=True) as bar:
        for entry in entries:
            pool, row = pools[entry.dtype], math.prod(entry.shape[1:])
            for first, end in row_blocks(entry.shape, entry.dtype):
                count = (end - first) * row
                begin = int(random.integers(0, pool.size - count))
                shards.put(entry.name, first * row * pool.itemsize, pool[begin:begin + count].view(np.uint8))
            bar.update(entry.nbytes)


if __name__ == "__main__":
    command.run(main, FLAGS)
