"""The Hopper kernel of all three products: persistent, warp-specialised, promoted to float32 every 128 of C.

A block of threads, one a multiprocessor, walks over output tiles of 128 rows. Its third warpgroup fetches 128 of C of
both operands at a time into a ring of stages in shared memory, ahead of what is computed and on through the end of a
tile. The other two multiply 64 rows each: every step starts a fresh accumulator in the tensor cores, whose sums keep
about 14 bits, and adds it, scaled, to one in float32 (V3 §3.3.2). While one promotes, the other keeps the tensor cores
busy. Two blocks of a cluster may share the rows of `a`: each fetches half of them for both.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.product.tiles import HALF, ROWS, STEP, Layout, Tiles, multiprocessors

FETCHING = 2  # the warpgroup that fetches; 0 and 1 compute
FETCHING_REGISTERS, COMPUTING_REGISTERS = 40, 232  # a thread, of 65,536 for 3 x 128 threads
SHARING = "sharing"  # the axis of a cluster


class Work(NamedTuple):
    """An output tile: where it starts, whose it is (None without experts), its first step of 128 and their number."""

    row: jax.Array
    column: jax.Array
    expert: jax.Array | None
    first: jax.Array | int
    steps: jax.Array | int


def walk(index, rows: int, columns: int, tiles: Tiles):
    """(row, column) where this block's tile begins, the `index`-th of its cluster: a snake through bands of columns.

    The last tiles end where the matrix ends: they may repeat entries of those before, with the same values.
    """
    down, across = tiles.counts(rows, columns)
    i, j = plgpu.planar_snake(index, (down, across // tiles.cluster), 1, tiles.band)
    if tiles.cluster > 1:
        j = j * tiles.cluster + lax.axis_index(SHARING)
    return jnp.minimum(i * ROWS, rows - ROWS), jnp.minimum(j * tiles.columns, columns - tiles.columns)


def swizzled(columns: int, dtype):
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns * jnp.dtype(dtype).itemsize)


def multiply(a_RC, scales_a, b, scales_b, tables, work: Callable[..., Work], n_work: int, out_shape, out_dtype, *,
             name: str, tiles: Tiles, promote: bool = True, sms: int | None = None, interpret=None):
    """Runs the kernel. C is a multiple of 128, R of 8, S of 32; R is at least 128, S at least `tiles.columns`.

    a_RC, scales_a (C/128, R); b (S, C) or (E, S, C), scales_b (C/128, S), or (C/128, ceil(S/128)) for blocks, after E
    if b has it. tables: int32 arrays that work(index, *tables) reads to say which tile is the `index`-th of `n_work`,
    counted in clusters. out_shape: (R, S), or (E, R, S) if each tile belongs to its expert's output. promote=False: the
    tensor cores add up all of C, and no scale is applied. sms: how many multiprocessors share the work.
    """
    by_block = scales_b.shape[-1] != b.shape[-2]
    columns, layout = tiles.columns, Layout.of(tiles, b.shape[-2], by_block, out_dtype)
    ring_has_a_scales = tiles.scales != "global"
    ring_has_b_scales = ring_has_a_scales and not by_block

    def kernel(a, sa, b, sb, *rest):
        *tables, out, a_ring, b_ring, sa_ring, sb_ring, store_ring, full, empty, turns = rest
        warpgroup = lax.axis_index("warpgroup")

        def slot_of(count):
            return lax.rem(count, jnp.int32(layout.stages))

        def of_expert(ref, task):
            return ref.at[task.expert] if len(ref.shape) == 3 else ref

        def for_each_tile(body):
            """body(task, count): count is the number of steps before it, by which both sides find their slots."""
            @plgpu.nd_loop((n_work,), collective_axes="multiprocessor", init_carry=jnp.int32(0))
            def _(info, carry):
                task = work(info.index[0], *tables)
                body(task, carry)
                return carry + task.steps

        def fetch_all():
            plgpu.set_max_registers(FETCHING_REGISTERS, action="decrease")

            def fetch_tile(task, count):
                rows, cols = pl.ds(task.row, ROWS), pl.ds(task.column, columns)

                @pl.loop(0, task.steps)
                def _(i):
                    slot, at = slot_of(count + i), task.first + i
                    along = pl.ds(at * STEP, STEP)

                    def fetch(source, ring, collective_axes=None):
                        plgpu.copy_gmem_to_smem(source, ring.at[slot], full.at[slot], collective_axes=collective_axes,
                                                oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

                    plgpu.barrier_wait(empty.at[slot])
                    fetch(a.at[rows, along], a_ring, SHARING if tiles.cluster > 1 else None)
                    fetch(of_expert(b, task).at[cols, along], b_ring)
                    if ring_has_a_scales:
                        fetch(sa.at[at, rows], sa_ring)
                    if ring_has_b_scales:
                        fetch(of_expert(sb, task).at[at, cols], sb_ring)

            for_each_tile(fetch_tile)
            for slot in range(layout.stages):  # a block must not leave while the other of its cluster still arrives
                plgpu.barrier_wait(empty.at[slot])

        def compute_all():
            plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
            mine = pl.ds(warpgroup * HALF, HALF)
            for slot in range(layout.stages):  # every slot is free
                plgpu.barrier_arrive(empty.at[slot])
            if tiles.turns:
                @pl.when(warpgroup == 1)
                def _():
                    plgpu.barrier_arrive(turns.at[0])  # the first turn

            def from_memory(task, i):
                """(scales of rows, of columns) of step i, or of the last: those that the ring does not bring."""
                at, of_rows, of_columns = task.first + jnp.clip(i, 0, jnp.maximum(task.steps - 1, 0)), (), ()
                if not ring_has_a_scales:
                    of_rows = plgpu.load(sa.at[at, pl.ds(task.row + warpgroup * HALF, HALF)],
                                         layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
                if by_block:
                    blocks = of_expert(sb, task)
                    of_columns = tuple(blocks[at, lax.div(task.column + start, 128)]
                                       for start in range(0, columns, layout.part))
                elif not ring_has_b_scales:
                    of_columns = plgpu.load(of_expert(sb, task).at[at, pl.ds(task.column, columns)],
                                            layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
                return of_rows, of_columns

            def promoted(task, count):
                """The parts of the tile, float32 (64, part) each."""
                def add_step(i, totals, scales):
                    of_rows, of_columns = scales
                    slot = slot_of(count + i)
                    plgpu.barrier_wait(full.at[slot])
                    if ring_has_a_scales:
                        of_rows = sa_ring[slot, mine]
                    if ring_has_b_scales:
                        of_columns = sb_ring[slot]
                    if tiles.scales == "shared":
                        plgpu.commit_smem()

                    def multiply_128(accumulator):
                        plgpu.wgmma(accumulator, a_ring.at[slot, mine], b_ring.at[slot].T)
                        if tiles.turns:
                            plgpu.barrier_arrive(turns.at[1 - warpgroup])  # its products queue behind these
                        return accumulator[...]

                    if tiles.turns:
                        plgpu.barrier_wait(turns.at[warpgroup])
                    sums = pl.run_scoped(multiply_128, plgpu.ACC((HALF, columns), jnp.float32))
                    plgpu.barrier_arrive(empty.at[slot])
                    if by_block:
                        return tuple(
                            total + sums[:, j * layout.part:(j + 1) * layout.part]
                            * lax.broadcast_in_dim(of_rows * of_block, total.shape, [0])
                            for j, (total, of_block) in enumerate(zip(totals, of_columns, strict=True)))
                    # not sums * (rows * columns): the compiler makes those products before the sums, and holds them
                    scaled = sums * lax.broadcast_in_dim(of_columns, sums.shape, [1])
                    return (totals[0] + scaled * lax.broadcast_in_dim(of_rows, sums.shape, [0]),)

                def one(i, totals):
                    return add_step(i, totals, from_memory(task, i))

                def two(pair, carry):
                    # blocks' scales are multiplied before the tensor cores start, so they are read a step ahead; in
                    # pairs, because a single step would copy the new ones to where the old ones were, and wait there
                    totals, scales = carry
                    ahead = from_memory(task, 2 * pair + 1)
                    totals = add_step(2 * pair, totals, scales)
                    scales = from_memory(task, 2 * pair + 2)
                    return add_step(2 * pair + 1, totals, ahead), scales

                zeros = plgpu.layout_cast(jnp.zeros((HALF, layout.part), jnp.float32), plgpu.Layout.WGMMA)
                totals, done = (zeros,) * (columns // layout.part), 0
                if by_block:
                    done = task.steps // 2 * 2
                    totals, _ = lax.fori_loop(0, task.steps // 2, two, (totals, from_memory(task, 0)))
                    if isinstance(done, int) and done == task.steps:
                        return totals
                return lax.fori_loop(done, task.steps, one, totals)

            def unpromoted(task, count):
                def multiply_all(accumulator):
                    @pl.loop(0, task.steps)
                    def _(i):
                        slot = slot_of(count + i)
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.wgmma(accumulator, a_ring.at[slot, mine], b_ring.at[slot].T)
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(empty.at[slot])

                    return accumulator[...]

                sums = pl.run_scoped(multiply_all, plgpu.ACC((HALF, columns), jnp.float32))
                return [sums[:, start:start + layout.part] for start in range(0, columns, layout.part)]

            def compute_tile(task, count):
                parts = (promoted if promote else unpromoted)(task, count)
                rows = pl.ds(task.row + warpgroup * HALF, HALF)
                for i, start in enumerate(range(0, columns, layout.slice)):
                    place, inside = store_ring.at[warpgroup, i % 2], start % layout.part
                    plgpu.wait_smem_to_gmem(min(i, 1), wait_read_only=True)
                    place[...] = parts[start // layout.part][:, inside:inside + layout.slice].astype(out_dtype)
                    plgpu.commit_smem()
                    cols = pl.ds(task.column + start, layout.slice)
                    plgpu.copy_smem_to_gmem(place, of_expert(out, task).at[rows, cols])

            for_each_tile(compute_tile)
            plgpu.wait_smem_to_gmem(0)
            if tiles.turns:
                @pl.when(warpgroup == 0)
                def _():
                    plgpu.barrier_wait(turns.at[0])  # a turn that nobody takes: barriers end where they began

        lax.cond(warpgroup == FETCHING, fetch_all, compute_all)

    def ring(shape, dtype, *transforms):
        return plgpu.SMEM((layout.stages, *shape), dtype, transforms=transforms)

    computing = dict(num_arrivals=2, num_barriers=layout.stages)  # of two warpgroups
    fetched = 2 + ring_has_a_scales + ring_has_b_scales
    cluster = {}
    empty = plgpu.Barrier(**computing)
    if tiles.cluster > 1:
        cluster = dict(cluster=(tiles.cluster,), cluster_names=(SHARING,))
        empty = plgpu.ClusterBarrier(collective_axes=(SHARING,), **computing)
    scratch = (
        ring((ROWS, STEP), a_RC.dtype, *swizzled(STEP, a_RC.dtype)),
        ring((columns, STEP), b.dtype, *swizzled(STEP, b.dtype)),
        ring((ROWS,), jnp.float32) if ring_has_a_scales else None,
        ring((columns,), jnp.float32) if ring_has_b_scales else None,
        plgpu.SMEM((2, 2, HALF, layout.slice), out_dtype, transforms=swizzled(layout.slice, out_dtype)),
        plgpu.Barrier(num_arrivals=fetched, num_barriers=layout.stages),
        empty,
        plgpu.Barrier(num_barriers=2) if tiles.turns else None,
    )
    return plgpu.kernel(
        kernel, out_type=jax.ShapeDtypeStruct(out_shape, out_dtype), scratch_types=scratch, kernel_name=name,
        grid=((sms or multiprocessors()) // tiles.cluster,), grid_names=("multiprocessor",), **cluster,
        num_threads=3, thread_name="warpgroup", interpret=interpret,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(a_RC, scales_a, b, scales_b, *tables)
