"""Tile choices that were measured, a JSON file a device: {operation: {shape: {field: value}}}.

`python -m kernels.bench --search` writes them; without a file, an operation or a shape, the kernels' defaults stand.
"""

import functools
import json
import re
from pathlib import Path

import jax

from kernels.record import commit, key_of, now, write_json

FOLDER = Path(__file__).parent
TARGET = "NVIDIA H200"  # what is meant where there is no GPU: lowering in tests, and kernels.aot


def file_of(device_kind: str) -> Path:
    """`NVIDIA H200` has h200.json, `NVIDIA H100 80GB HBM3` has h100_80gb_hbm3.json."""
    words = re.findall(r"[a-z0-9]+", device_kind.lower())
    return FOLDER / f"{'_'.join(word for word in words if word != 'nvidia')}.json"


def tuned(operation: str, shape: tuple[int, ...]) -> dict[str, int]:
    """The measured fields of an operation's tile choice at this shape, for `dataclasses.replace`; {} for defaults."""
    return read(device_kind()).get(operation, {}).get(key_of(shape), {})


def device_kind() -> str:
    """The GPU that the kernels are meant for (kernels.choice), or run on; the target where there is none."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return device.device_kind if device.platform == "gpu" else TARGET


@functools.cache
def read(kind: str) -> dict:
    """The choices for a device, {} where none were measured. `read.cache_clear()` after a file has changed."""
    path = file_of(kind)
    return json.loads(path.read_text())["choices"] if path.exists() else {}


def write(kind: str, operation: str, shape: tuple[int, ...], fields: dict[str, int]) -> None:
    """Sets the choice of one operation at one shape in the device's file; the others stay."""
    path = file_of(kind)
    content = json.loads(path.read_text()) if path.exists() else {"choices": {}}
    choices = content["choices"]
    choices.setdefault(operation, {})[key_of(shape)] = fields
    write_json(path, {"device": kind, "measured": now(), "commit": commit(), "choices": choices})
    read.cache_clear()
