"""Tiles of the Hopper kernels of products: what a search varies, what runs by default, and what follows from them."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

ROWS = 128  # of an output tile
HALF = ROWS // 2  # rows of each computing warpgroup, as many as a tensor-core instruction has
STEP = 128  # of the contraction, between promotions
SHARED_MEMORY = 232448  # bytes a block of threads may have on Hopper
H200_MULTIPROCESSORS = 132
SCALES = ("global", "shared", "unfenced")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What a search varies.

    columns: of an output tile. stages: of the ring; fewer where shared memory is short. cluster: 2 for two blocks that
    share rows. band: column tiles that are walked together, for the second-level cache. scales: read from `global`
    memory, a step ahead; or fetched through the ring, `shared`, where a fence orders their reading before the next
    fetch into their place; `unfenced` leaves it out, as CUDA libraries do and the memory model does not allow. turns:
    the two computing warpgroups alternate at the tensor cores, instead of whenever their data is there.
    """

    columns: int = 128
    stages: int = 5
    cluster: int = 1
    band: int = 8
    scales: str = "global"
    turns: bool = False

    def __post_init__(self):
        if self.columns % 32 or not 32 <= self.columns <= 256:
            raise ValueError(f"Tiles.columns={self.columns}: expected a multiple of 32 up to 256")
        if self.stages < 2:
            raise ValueError(f"Tiles.stages={self.stages}: expected at least 2")
        if self.cluster not in (1, 2):
            raise ValueError(f"Tiles.cluster={self.cluster}: expected 1 or 2")
        if self.band < 1:
            raise ValueError(f"Tiles.band={self.band}: expected at least 1")
        if self.scales not in SCALES:
            raise ValueError(f"Tiles.scales={self.scales!r}: expected one of {', '.join(SCALES)}")

    def counts(self, rows: int, columns: int) -> tuple[int, int]:
        """How many tiles a matrix has, down and across. ValueError where they do not fit."""
        down, across = -(-rows // ROWS), -(-columns // self.columns)
        if rows < ROWS or columns < self.columns or across % self.cluster:
            raise ValueError(f"{self} does not fit a matrix of {rows} x {columns}")
        return down, across


class Layout(NamedTuple):
    """Sizes that follow: from the tiles, S, the output's type and whether b has one scale for a block of 128 of S."""

    part: int  # columns of a tile that share a scale of b, wherever it starts
    slice: int  # columns that are stored at a time, wherever a tile starts: at most the widest swizzle's 128 bytes
    stages: int

    @classmethod
    def of(cls, tiles: Tiles, columns: int, by_block: bool, out_dtype):
        itemsize = jnp.dtype(out_dtype).itemsize
        part = math.gcd(tiles.columns, 128, columns) if by_block else tiles.columns
        width = math.gcd(part, columns, 128 // itemsize)
        ring_scales = 0 if tiles.scales == "global" else 1 if by_block else 2  # of the rows, and of the columns

        def size(stages):
            scales = (ROWS, tiles.columns)[:ring_scales]
            return (stages * STEP * (ROWS + tiles.columns) + sum(_allocated(4 * stages * n) for n in scales)
                    + _allocated(4 * HALF * width * itemsize) + 1024)  # the barriers'

        return cls(part, width, max(n for n in range(2, tiles.stages + 1) if size(n) <= SHARED_MEMORY))


def _allocated(n_bytes: int) -> int:
    """Each array in shared memory is rounded up to a kibibyte."""
    return -(-n_bytes // 1024) * 1024


def multiprocessors() -> int:
    """Of the GPU that is meant (kernels.choice), or of ours; the target's where there is none."""
    meant, device = jax.sharding.get_abstract_mesh().abstract_device, jax.devices()[0]
    if meant and meant.num_cores:  # that of a mesh of CPUs has none
        return meant.num_cores
    return device.core_count if device.platform == "gpu" else H200_MULTIPROCESSORS


def default(rows: int, columns: int, by_block: bool) -> Tiles:
    """128 columns, or 192 where those take less time by the rounds that all multiprocessors make.

    A round costs its columns, and as much as 32 of them beside: a guess from an H100's times (experiments/LOG.md).
    """
    def time(tiles):
        down, across = tiles.counts(rows, columns)
        return -(-down * across // multiprocessors()) * (tiles.columns + 32)

    usual = Tiles(stages=6, scales="shared")
    wide = dataclasses.replace(usual, columns=192)
    if by_block and columns >= 192 and time(wide) < time(usual):  # with a scale a row, 192 columns spill registers
        return wide
    return usual


def candidates(columns: int, by_block: bool) -> list[Tiles]:
    """What a search tries for a matrix of so many columns."""
    found = []
    for width in (128, 160, 192) if by_block else (128,):
        clusters = (1, 2) if -(-columns // width) % 2 == 0 else (1,)
        if width <= columns:
            found += [Tiles(columns=width, cluster=cluster, scales=scales, stages=6)
                      for cluster in clusters for scales in SCALES]
            found += [Tiles(columns=width, cluster=cluster, band=band, stages=6)
                      for cluster in clusters for band in (4, 16)]
            found += [Tiles(columns=width, cluster=cluster, scales=scales, stages=6, turns=True)
                      for cluster in clusters for scales in ("shared", "unfenced")]
    return [*found, Tiles(stages=4)]
