"""Absorbed attention on Hopper: slots of a sequence are split among blocks of threads, whose results are combined.

A block of threads takes 64 rows of queries (new tokens x heads) of one sequence and a run of its slots, 64 at a time:
their latents, keys and values at once, are read from memory one time. Its third warpgroup fetches them into a ring of
two stages. The first computes scores and softmax, and leaves the probabilities in shared memory; it and the second
multiply them with half of the latents' columns each, as float32 sums of all 512 would fill one's registers.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.mla_decode import BLOCK
from kernels.mla_decode.shapes import Shape
from kernels.once import traced_once
from kernels.product.pipeline import COMPUTING_REGISTERS, FETCHING, FETCHING_REGISTERS, swizzled
from kernels.product.tiles import multiprocessors
from kernels.tuned import tuned

ROWS = 64  # of queries: as many as a tensor-core instruction has
COLUMNS = 128  # of the latents that a warpgroup multiplies at a time; with 64, registers are spilled
STAGES = 2
SCORING = 0  # the warpgroup that computes scores; 1 only sums
LEAST = 1e-37  # instead of 0 under a logarithm
FLOOR = -1e30  # below every score, and finite: a row that has seen nothing yet has no infinities to subtract
MATRIX, ROW_VECTOR = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What a search varies. splits: of a sequence's blocks of 64 slots, whose number its length says at run time."""

    splits: int = 1

    def __post_init__(self):
        if self.splits < 1:
            raise ValueError(f"Tiles.splits={self.splits}: expected at least 1")


def tasks(shape: Shape) -> int:
    """Of 64 rows of queries each, over all slots."""
    return shape.batch * -(-shape.tokens * shape.heads // ROWS)


def default(shape: Shape) -> Tiles:
    """As many splits as the multiprocessors take at once, each of two blocks of slots at least."""
    return Tiles(max(1, min(multiprocessors() // tasks(shape), shape.slots // (2 * BLOCK))))


def chosen(shape: Shape) -> Tiles:
    """The tiles that run at a shape: measured ones, or the default."""
    return dataclasses.replace(default(shape), **tuned("mla_decode", shape))


def candidates(shape: Shape) -> list[Tiles]:
    """What a search tries: up to four rounds of the multiprocessors, and a block of slots a split."""
    most = min(max(1, 4 * multiprocessors() // tasks(shape)), shape.slots // BLOCK)
    return [Tiles(2**i) for i in range(most.bit_length())]


@traced_once("scale", "tiles", "interpret")
def mla_decode(q_latent_BTNR, q_rope_BTNP, latent_BSR, rope_key_BSP, lengths_B, scale: float, *,
               tiles: Tiles | None = None, interpret=None):
    """See the reference. All bfloat16; S a multiple of 64, R of 256. interpret: for tests without a GPU."""
    B, T, N, R = q_latent_BTNR.shape
    tiles = tiles or chosen(Shape(B, T, N, latent_BSR.shape[1]))
    Q, padding = T * N, -(T * N) % ROWS

    def rows(q):
        return jnp.pad(q.reshape(B, Q, -1), ((0, 0), (0, padding), (0, 0)))

    last_BQ = jnp.repeat(lengths_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None], N, axis=1)
    last_BQ = jnp.pad(last_BQ, ((0, 0), (0, padding)), mode="edge")
    o_BIKQR, lse_BIKQ = partial_results(rows(q_latent_BTNR), rows(q_rope_BTNP), latent_BSR, rope_key_BSP, last_BQ,
                                        scale, tiles.splits, interpret)
    o_BQR = combine(o_BIKQR, lse_BIKQ).reshape(B, Q + padding, R)[:, :Q]
    return o_BQR.reshape(B, T, N, R).astype(q_latent_BTNR.dtype)


def combine(o_BIKQR, lse_BIKQ):
    """The attention over all slots, from that over the slots of each split K and log2 of its sum of exponentials."""
    weight_BIKQ = jnp.exp2(lse_BIKQ - jnp.max(lse_BIKQ, axis=2, keepdims=True))
    return jnp.sum(o_BIKQR * weight_BIKQ[..., None], axis=2) / jnp.sum(weight_BIKQ, axis=2)[..., None]


def partial_results(q_BQR, q_BQP, latent_BSR, rope_key_BSP, last_BQ, scale: float, splits: int, interpret=None):
    """Attention of rows, a multiple of 64, over each split's slots up to last_BQ, which grows along a sequence's rows.

    A task X of the kernel is a sequence, 64 of its rows, and a split. Returns (o_BIKQR, lse_BIKQ), float32, of the I-th
    64 rows and the split K: lse is log2 of the sum of exponentials, about -1e30 of a split in which a row sees no slot,
    whose o is 0.
    """
    (B, Q, R), (S, P) = q_BQR.shape, rope_key_BSP.shape[1:]
    half, n_tiles = R // 2, Q // ROWS
    scale = scale * math.log2(math.e)  # of exponentials with base 2, which the hardware has

    n_tasks = B * n_tiles * splits
    # a table, not arithmetic in the kernel: where the compiler sees that something is always 0, it spills registers
    sequence_X, tile_X, split_X = jnp.unravel_index(jnp.arange(n_tasks, dtype=jnp.int32), (B, n_tiles, splits))
    blocks_X = (jnp.minimum(last_BQ[:, -1], S - 1) // BLOCK + 1)[sequence_X]
    most_X = -(-blocks_X // splits)
    first_X = split_X * most_X
    task_4X = jnp.stack([sequence_X, tile_X, first_X, jnp.clip(blocks_X - first_X, 0, most_X)])

    def kernel(q_latent, q_rope, latent, rope_key, last, tasks, o, lse, *scratch):
        q_latent_s, q_rope_s, latent_s, rope_key_s, p_s, factor_s, asked, full, empty, ready, used = scratch
        warpgroup, task = lax.axis_index("warpgroup"), lax.axis_index("task")
        b, tile, first, steps = (tasks[i, task] for i in range(4))
        rows = pl.ds(tile * ROWS, ROWS)

        def slot_of(i):
            return lax.rem(i, jnp.int32(STAGES))

        def fetch():
            plgpu.set_max_registers(FETCHING_REGISTERS, action="decrease")
            plgpu.copy_gmem_to_smem(q_latent.at[b, rows], q_latent_s, asked)
            plgpu.copy_gmem_to_smem(q_rope.at[b, rows], q_rope_s, asked)

            @pl.loop(0, steps)
            def _(i):
                slot, slots = slot_of(i), pl.ds((first + i) * BLOCK, BLOCK)
                plgpu.barrier_wait(empty.at[slot])
                plgpu.copy_gmem_to_smem(latent.at[b, slots], latent_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(rope_key.at[b, slots], rope_key_s.at[slot], full.at[slot])

            for slot in range(STAGES):  # a barrier must not go while someone still arrives at it
                plgpu.barrier_wait(empty.at[slot])

        def compute():
            plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
            for slot in range(STAGES):  # every slot is free, and so are the places of probabilities and factors
                plgpu.barrier_arrive(empty.at[slot])
            plgpu.barrier_arrive(used)
            # a loop of each warpgroup's own: with one loop and a condition in it, 620 bytes of registers were spilled
            lax.cond(warpgroup == SCORING, score_and_sum, sum_only)

        def score_and_sum():
            plgpu.barrier_wait(asked)

            def step(i, carry):
                sums, largest, total = carry
                plgpu.barrier_wait(full.at[slot_of(i)])
                largest, total = leave_probabilities(i, largest, total)
                return add(i, sums, 0), largest, total

            sums, largest, total = lax.fori_loop(
                0, steps, step, (zeros(), constant(FLOOR, ROW_VECTOR, ROWS), constant(0.0, ROW_VECTOR, ROWS)))
            plgpu.barrier_wait(used)
            factor_s[...] = jnp.where(total > 0, 1 / total, 0.0)
            plgpu.barrier_arrive(ready)
            lse[task] = largest + jnp.log2(jnp.maximum(total, LEAST))
            store(sums, 0)

        def sum_only():
            def step(i, sums):
                plgpu.barrier_wait(full.at[slot_of(i)])
                return add(i, sums, half)

            store(lax.fori_loop(0, steps, step, zeros()), half)

        def leave_probabilities(i, largest, total):
            """Those of step i, and the factor of what was summed before it. Returns the new maxima and totals."""
            slot = slot_of(i)

            def multiply(accumulator):
                plgpu.wgmma(accumulator, q_latent_s, latent_s.at[slot].T)
                plgpu.wgmma(accumulator, q_rope_s, rope_key_s.at[slot].T)
                return accumulator[...]

            score = pl.run_scoped(multiply, plgpu.ACC((ROWS, BLOCK), jnp.float32)) * scale
            # read at every step: kept in registers, some of those would be spilled
            last_Q = plgpu.load(last.at[b, rows], layout=ROW_VECTOR, optimized=False)
            at = plgpu.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 1, layout=MATRIX) + (first + i) * BLOCK
            score = jnp.where(at <= along_rows(last_Q, BLOCK), score, -jnp.inf)
            larger = jnp.maximum(largest, jnp.max(score, axis=1))
            factor, p = jnp.exp2(largest - larger), jnp.exp2(score - along_rows(larger, BLOCK))
            plgpu.barrier_wait(used)
            factor_s[...] = factor
            p_s[...] = p.astype(p_s.dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(ready)
            return larger, total * factor + jnp.sum(p, axis=1)

        def add(i, sums, start):
            """sums, and step i's probabilities times its latents' columns from `start` on."""
            slot = slot_of(i)
            plgpu.barrier_wait(ready)
            factor = along_rows(factor_s[...], COLUMNS)

            def added(part, start):
                def multiply(accumulator):
                    plgpu.wgmma(accumulator, p_s, latent_s.at[slot, :, pl.ds(start, COLUMNS)])
                    return accumulator[...]

                return part * factor + pl.run_scoped(multiply, plgpu.ACC((ROWS, COLUMNS), jnp.float32))

            sums = tuple(added(part, start + j * COLUMNS) for j, part in enumerate(sums))
            plgpu.barrier_arrive(used)
            plgpu.barrier_arrive(empty.at[slot])
            return sums

        def store(sums, start):
            plgpu.barrier_wait(ready)
            inverse = along_rows(factor_s[...], COLUMNS)
            for j, part in enumerate(sums):
                o[task, :, pl.ds(start + j * COLUMNS, COLUMNS)] = part * inverse

        def zeros():
            return (constant(0.0, MATRIX, ROWS, COLUMNS),) * (half // COLUMNS)

        lax.cond(warpgroup == FETCHING, fetch, compute)

    def constant(value, layout, *shape):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def along_rows(vector, columns):
        return lax.broadcast_in_dim(vector, (ROWS, columns), [0])

    def shared(dtype, *shape):
        return plgpu.SMEM(shape, dtype, transforms=swizzled(64, dtype))

    both = dict(num_arrivals=2)  # of two warpgroups, or of latents and rotary keys
    scratch = (
        shared(q_BQR.dtype, ROWS, R), shared(q_BQP.dtype, ROWS, P),
        shared(latent_BSR.dtype, STAGES, BLOCK, R), shared(rope_key_BSP.dtype, STAGES, BLOCK, P),
        shared(latent_BSR.dtype, ROWS, BLOCK), plgpu.SMEM((ROWS,), jnp.float32),
        plgpu.Barrier(**both), plgpu.Barrier(**both, num_barriers=STAGES), plgpu.Barrier(**both, num_barriers=STAGES),
        plgpu.Barrier(), plgpu.Barrier(**both))
    o, lse = plgpu.kernel(
        kernel, scratch_types=scratch, kernel_name="mla_decode", interpret=interpret,
        out_type=(jax.ShapeDtypeStruct((n_tasks, ROWS, R), jnp.float32),
                  jax.ShapeDtypeStruct((n_tasks, ROWS), jnp.float32)),
        grid=(n_tasks,), grid_names=("task",), num_threads=3, thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True,
            reduction_scratch_bytes=0),  # a row is in one warp; two stages leave no more than 2 KiB of shared memory
    )(q_BQR, q_BQP, latent_BSR, rope_key_BSP, last_BQ, task_4X)
    return o.reshape(B, n_tiles, splits, ROWS, R), lse.reshape(B, n_tiles, splits, ROWS)
