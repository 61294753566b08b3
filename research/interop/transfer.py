"""Tensors on their way between two stores: read, checked, changed and written in blocks of rows, several at a time."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from absl import logging
from tqdm import tqdm

from research.interop import blocks
from research.interop.names import SCALE, in_blocks
from research.interop.tensors import DTYPES, FP8, ITEM_BYTES

AT_ONCE = 2**24  # bytes of a source tensor in memory, in whole blocks of rows
ALONE = 2**28  # bytes of work from which nothing else is done beside it
WORKERS = 2
CASTS = {"float32": "F32", "bfloat16": "BF16"}


def target(dtype: str, path: str, quantize: str | None, cast: str | None) -> str:
    """The dtype in which a tensor of our array at `path`, stored in `dtype`, leaves.

    quantize: None keeps FP8 blocks as they are, `none` dequantises them, `fp8_blocks` makes them where the release has
    them. cast: of other floats, None as they are; routing biases, whose small differences choose experts, stay.
    """
    if in_blocks(path) and (quantize == "fp8_blocks" or (dtype == FP8 and quantize is None)):
        return FP8
    if cast is not None and not path.startswith("routing/"):
        return CASTS[cast]
    return "F32" if dtype == FP8 else dtype


class Piece(NamedTuple):
    """A tensor under way. `read(first, end)` gives rows of its first axis, in the release's orientation."""

    name: str
    shape: tuple[int, ...]
    source: str
    target: str
    read: Callable[[int, int], np.ndarray]
    scales: Callable[[], np.ndarray] | None  # of a source in FP8
    write: Callable[[Iterator[np.ndarray]], int]  # the rows as they come; returns how many bytes had to be written
    write_scales: Callable[[np.ndarray], int]


class Work(NamedTuple):
    """Pieces that are read together, and how many bytes that takes."""

    nbytes: int
    pieces: Callable[[], Iterable[Piece]]


@dataclass
class Account:
    """What was moved."""

    tensors: int = 0
    read: int = 0
    written: int = 0
    infinite: list[str] = field(default_factory=list)  # names of tensors with NaN or infinite values


def transfer(works: Iterable[Work], total: int) -> Account:
    """Moves all pieces, with a progress bar over `total` bytes.

    Once a value is not finite, nothing more is written: the rest is read for its names alone.
    """
    account, running = Account(), set()

    def settle(until: int) -> None:
        nonlocal running
        while len(running) > until:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                read, written = future.result()
                account.read += read
                account.written += written
                progress.update(read)

    with _Progress(total) as progress, ThreadPoolExecutor(WORKERS) as pool:
        for work in works:
            alone = work.nbytes >= ALONE
            settle(0 if alone else WORKERS - 1)
            future: Future = pool.submit(_move, work, account.infinite)
            running.add(future)
            if alone:
                settle(0)
        settle(0)
    return account


def _move(work: Work, infinite: list[str]) -> tuple[int, int]:
    return work.nbytes, sum(_pour(piece, infinite) for piece in work.pieces())


def _pour(piece: Piece, infinite: list[str]) -> int:
    """Moves one piece; returns how many bytes had to be written."""
    scales, made, wrong = None, [], set()
    if piece.scales is not None:
        scales = piece.scales()
        if not blocks.finite(scales):
            wrong.add(piece.name + SCALE)

    def rows() -> Iterator[np.ndarray]:
        for first, end in row_blocks(piece.shape, piece.source):
            values = piece.read(first, end)
            if not blocks.finite(values):
                wrong.add(piece.name)
            if wrong or infinite:
                continue
            part = None if scales is None else scales[first // blocks.BLOCK:-(-end // blocks.BLOCK)]
            values, part = changed(values, part, piece.target)
            if part is not None:
                made.append(part)
            yield np.ascontiguousarray(values)

    written = piece.write(rows())
    infinite.extend(sorted(wrong))
    if made and not infinite:
        written += piece.write_scales(np.ascontiguousarray(np.concatenate(made)))
    return written


def changed(values, scales, dtype: str):
    """(values, scales or None) in another dtype; rows from a multiple of 128 on."""
    if values.dtype == DTYPES[dtype]:
        return values, scales
    if scales is not None:
        values = blocks.dequantize(values, scales)
    if dtype == FP8:
        return blocks.quantize(values.astype(np.float32))
    return values.astype(DTYPES[dtype]), None


def row_blocks(shape: tuple[int, ...], dtype: str) -> Iterator[tuple[int, int]]:
    """(first, end) of rows of the first axis, multiples of 128 that take about AT_ONCE bytes."""
    row = int(np.prod(shape[1:], dtype=np.int64)) * ITEM_BYTES[dtype]
    step = max(AT_ONCE // row // blocks.BLOCK, 1) * blocks.BLOCK
    for first in range(0, shape[0], step):
        yield first, min(first + step, shape[0])


class _Progress:
    """A bar on a terminal; elsewhere a line every 30 seconds."""

    def __init__(self, total: int):
        self._bar = tqdm(total=total, unit="B", unit_scale=True, dynamic_ncols=True, mininterval=0.5, file=sys.stderr,
                         disable=not sys.stderr.isatty())
        self._total, self._done = total, 0
        self._start = self._said = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    def update(self, size: int) -> None:
        self._bar.update(size)
        self._done += size
        now = time.monotonic()
        if self._bar.disable and now - self._said >= 30:
            self._said = now
            left = (now - self._start) / self._done * (self._total - self._done)
            logging.info("%.1f of %.1f GB, %s left", self._done / 1e9, self._total / 1e9, tqdm.format_interval(left))
