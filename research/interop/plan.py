"""What a conversion will move, from shapes alone: for models that are too large to try it."""

import math
from pathlib import Path

from research import config, experiment
from research.errors import RequestError
from research.interop.names import SCALE, in_blocks, repeats
from research.interop.shards import Entry, entries_of
from research.interop.tensors import FP8
from research.interop.transfer import target
from research.interop.variables import Array, arrays_of

SPEEDS = (200, 500, 1000, 2000)  # MB/s
DEVICES = (8, 32, 256)


def plan(file: Path, quantize: str | None, dtype: str | None) -> str:
    """Lines of tensors, bytes, minutes and bytes a device, for the model of an experiment, stored as `released`."""
    try:
        settings = config.check(experiment.load(str(file)))
    except RequestError as error:
        raise RequestError(str(error).replace("--config=", "--source=", 1)) from None
    if settings.model.vocab_size is None:
        raise RequestError.field("model.vocab_size", None, "must be a whole number to plan a conversion")
    arrays = arrays_of(settings)
    dtypes = released(arrays)
    before = list(entries_of(arrays, dtypes, repeats(settings)))
    after = list(entries_of(arrays, {path: target(dtypes[path], path, quantize, dtype) for path in arrays}, {}))
    read, written = stored(before), stored(after)
    largest = max(before, key=lambda entry: entry.nbytes)
    lines = [f"read: {len(before):,} tensors of {weights(before):,} weights, FP8 blocks as released, {read:,} bytes",
             f"largest: {largest.name}, {largest.nbytes:,} bytes",
             f"written: {len(after):,} tensors, {written:,} bytes"]
    lines += [f"where copying runs at {speed:,} MB/s: {max(read, written) / speed / 6e7:,.1f} minutes"
              for speed in SPEEDS]
    experts = [entry for entry in after if ".experts." in entry.name]
    others = [entry for entry in after if ".experts." not in entry.name]
    lines += [f"mesh.expert={devices}, the rest on each: a device reads "
              f"{(stored(others) + stored(experts) / devices) / 1e9:,.1f} GB and holds "
              f"{(weights(others) + weights(experts) / devices) * 4e-9:,.1f} GB in float32"
              for devices in DEVICES if experts and settings.model.n_routed_experts % devices == 0]
    return "\n".join(lines)


def released(arrays: dict[str, Array]) -> dict[str, str]:
    """{path: dtype} of the release: E4M3 blocks, float32 routing biases, bfloat16."""
    return {path: FP8 if in_blocks(path) else "F32" if path.startswith("routing/") else "BF16" for path in arrays}


def stored(found: list[Entry]) -> int:
    """Bytes."""
    return sum(entry.nbytes for entry in found)


def weights(found: list[Entry]) -> int:
    """Numbers that are no scales."""
    return sum(math.prod(entry.shape) for entry in found if not entry.name.endswith(SCALE))
