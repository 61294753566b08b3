"""What the kernels that read and write every entry once have in common, here and in `kernels.swiglu`.

A warpgroup walks along a row of blocks. While it computes one, later ones are fetched into rings in shared memory, and
the one before is written from its place there. Several warpgroups share a multiprocessor and hide each other's waits.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCK = 128  # entries of a tile: columns of a block, and its rows where columns are quantised too
CHUNK = 64  # rows that a warpgroup holds in registers at a time


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What a search varies.

    rows: of a block. steps: blocks along a row that one warpgroup computes. stages: blocks that it has fetched or is
    fetching. places: for blocks that it has computed; with one it waits until the last is written.
    """

    rows: int = BLOCK
    steps: int = 8
    stages: int = 1
    places: int = 1

    def __post_init__(self):
        if self.rows not in (CHUNK, BLOCK):
            raise ValueError(f"Tiles.rows={self.rows}: expected {CHUNK} or {BLOCK}")
        for name in ("steps", "stages", "places"):
            if getattr(self, name) < 1:
                raise ValueError(f"Tiles.{name}={getattr(self, name)}: expected at least 1")


def without_conflicts(dtype):
    """How a matrix lies in shared memory, so that a warpgroup reads and writes it quickly."""
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


class Operand(NamedTuple):
    """An array in global memory, or what describes a result; where(r, c, rows) is the part of it in block (r, c).

    where=None: the kernel sees all of it, where it is.
    """

    array: jax.Array | jax.ShapeDtypeStruct
    where: Callable | None

    def buffers(self, number: int, rows: int):
        """Places in shared memory for so many parts."""
        shape = tuple(part.size for part in self.where(0, 0, rows) if isinstance(part, pl.Slice))
        transforms = without_conflicts(self.array.dtype) if len(shape) == 2 else ()
        return plgpu.SMEM((number, *shape), self.array.dtype, transforms=transforms)


def at_block(r, c, rows):
    """Of a matrix (R, C)."""
    return pl.ds(r * rows, rows), pl.ds(c * BLOCK, BLOCK)


def at_block_transposed(r, c, rows):
    """Of a matrix (C, R)."""
    return at_block(r, c, rows)[::-1]


def at_scales(r, c, rows):
    """Of scales (C/128, R)."""
    return c, pl.ds(r * rows, rows)


def at_scales_transposed(r, c, rows):
    """Of scales (R/128, C): of tiles of 128 along the transpose."""
    return r, pl.ds(c * BLOCK, BLOCK)


def over_blocks(compute, shape, inputs, outputs, tiles: Tiles, *, name: str, approximate: bool = False,
                interpret=None):
    """Runs compute(r, c, *inputs' parts, *outputs' parts) on all blocks of a matrix of this shape; returns the outputs.

    inputs, outputs: Operands; with `where` their parts are in shared memory. shape: multiples of 128. approximate:
    exponentials may be off by a few units in the last place.
    """
    rows, steps = tiles.rows, math.gcd(tiles.steps, shape[1] // BLOCK)
    fetched = [operand for operand in inputs if operand.where]
    written = [operand for operand in outputs if operand.where]

    def kernel(*refs):
        sources, targets, rings, places, (arrived,) = _split(refs, inputs, outputs, fetched, written)
        r, first = lax.axis_index("rows"), lax.axis_index("columns") * steps

        def parts(operands, refs, buffers, at):
            buffers = iter(buffers)
            return [next(buffers).at[at] if operand.where else ref for operand, ref in zip(operands, refs, strict=True)]

        def fetch(i):
            slot, rest = lax.rem(i, tiles.stages), iter(rings)
            for operand, source in zip(inputs, sources, strict=True):
                if operand.where:
                    plgpu.copy_gmem_to_smem(source.at[operand.where(r, first + i, rows)], next(rest).at[slot],
                                            arrived.at[slot])

        for i in range(min(tiles.stages, steps)):
            fetch(jnp.int32(i))

        @pl.loop(0, steps)
        def _(i):
            slot, place, c = lax.rem(i, tiles.stages), lax.rem(i, tiles.places), first + i
            plgpu.barrier_wait(arrived.at[slot])
            plgpu.wait_smem_to_gmem(len(written) * (tiles.places - 1), wait_read_only=True)  # the place is free
            compute(r, c, *parts(inputs, sources, rings, slot), *parts(outputs, targets, places, place))
            plgpu.commit_smem()  # orders what was stored before its copy, and what was loaded before the next fetch
            rest = iter(places)
            for operand, target in zip(outputs, targets, strict=True):
                if operand.where:
                    plgpu.copy_smem_to_gmem(next(rest).at[place], target.at[operand.where(r, c, rows)])

            @pl.when(i + tiles.stages < steps)
            def _():
                fetch(i + tiles.stages)

        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel, grid=(shape[0] // rows, shape[1] // BLOCK // steps), grid_names=("rows", "columns"),
        scratch_types=[*(operand.buffers(tiles.stages, rows) for operand in fetched),
                       *(operand.buffers(tiles.places, rows) for operand in written),
                       plgpu.Barrier(num_arrivals=len(fetched), num_barriers=tiles.stages)],
        out_type=tuple(jax.ShapeDtypeStruct(operand.array.shape, operand.array.dtype) for operand in outputs),
        compiler_params=plgpu.CompilerParams(approx_math=approximate), kernel_name=name, interpret=interpret)(
            *(operand.array for operand in inputs))


def _split(refs, *lists):
    """The refs of each list of operands, and what is left."""
    refs = iter(refs)
    return *([next(refs) for _ in operands] for operands in lists), list(refs)


def for_chunks(rows: int):
    """Decorates a function of a part of so many rows: a loop, which halves the code and the registers."""
    def decorate(body):
        @pl.loop(0, rows // CHUNK)
        def _(i):
            body(pl.ds(i * CHUNK, CHUNK))
    return decorate
