"""SwiGLU on Hopper, fused with quantisation: the reference's arithmetic, with exponentials that are approximate.

Sizes that are no multiples of 128 are padded, which copies the operands. interpret: for tests without a GPU.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.once import traced_once
from kernels.quantize.mosaic import (
    BY_COLUMNS,
    BY_ROWS,
    E4M3,
    quantized_rows,
    scales,
    scales_transposed,
    values,
    values_transposed,
)
from kernels.quantize.stream import (
    BLOCK,
    CHUNK,
    Operand,
    Tiles,
    at_block,
    for_chunks,
    over_blocks,
    without_conflicts,
)
from kernels.swiglu import reference
from kernels.swiglu.shapes import Shape
from kernels.tuned import tuned

WARPGROUPS = BLOCK // CHUNK  # of the backward kernel: each computes half of a block's rows, then half of its columns


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """What a search varies. steps: blocks along a row that one block of threads computes."""

    steps: int = 8

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"BackwardTiles.steps={self.steps}: expected at least 1")


def chosen_for_forward(shape: Shape) -> Tiles:
    """The tiles that run at a shape: measured ones, or the default."""
    return dataclasses.replace(Tiles(rows=64), **tuned("swiglu_forward", shape))


def chosen_for_backward(shape: Shape) -> BackwardTiles:
    """The tiles that run at a shape: measured ones, or the default."""
    return dataclasses.replace(BackwardTiles(), **tuned("swiglu_backward", shape))


FORWARD_CANDIDATES = [Tiles(rows, steps, stages, places) for steps in (1, 4, 8, 16)
                      for rows, stages, places in ((64, 1, 1), (64, 2, 1), (64, 2, 2), (128, 1, 1))
                      if max(stages, places) <= steps]
BACKWARD_CANDIDATES = [BackwardTiles(steps) for steps in (1, 2, 4, 8, 16)]


@traced_once("power_of_two", "tiles", "interpret")
def forward(g_RF, u_RF, power_of_two: bool = False, *, tiles: Tiles | None = None, interpret=None):
    """See the reference."""
    (R, F), tiles = g_RF.shape, tiles or chosen_for_forward(Shape(*g_RF.shape))

    def compute(r, c, g, u, a_values, a_scales, g_values, g_scales, u_values, u_scales):
        def read(ref, part):
            return plgpu.load(ref.at[part], layout=BY_ROWS)

        @for_chunks(tiles.rows)
        def _(part):
            a = reference.output(read(g, part).astype(jnp.float32), read(u, part).astype(jnp.float32))
            a_values[part], a_scales[part] = quantized_rows(a, power_of_two)

        @for_chunks(tiles.rows)
        def _(part):
            g_values[part], g_scales[part] = quantized_rows(read(g, part))

        @for_chunks(tiles.rows)
        def _(part):
            u_values[part], u_scales[part] = quantized_rows(read(u, part))

    g_RF, u_RF = _padded(g_RF), _padded(u_RF)
    shape = g_RF.shape
    results = over_blocks(compute, shape, [Operand(g_RF, at_block), Operand(u_RF, at_block)],
                          3 * [values(*shape), scales(*shape)], tiles, name="swiglu_forward", approximate=True,
                          interpret=interpret)
    return _cut(results, 3 * [(R, F), (-(-F // BLOCK), R)])


@traced_once("tiles", "interpret")
def backward(g_RF, g_scales, u_RF, u_scales, da_RF, weight_R, *, tiles: BackwardTiles | None = None, interpret=None):
    """See the reference. da: of 16 bits."""
    (R, F), tiles = g_RF.shape, tiles or chosen_for_backward(Shape(*g_RF.shape))
    rows = -R % BLOCK
    results = _backward(_padded(g_RF), jnp.pad(g_scales, ((0, 0), (0, rows))), _padded(u_RF),
                        jnp.pad(u_scales, ((0, 0), (0, rows))), _padded(da_RF),
                        jnp.pad(weight_R.astype(jnp.float32), (0, rows)), tiles, interpret)
    r, f = -(-R // BLOCK), -(-F // BLOCK)
    both, transposed = [(R, F), (f, R), (F, R), (r, F)], [(F, R), (r, F)]
    *quantized, dweights = _cut(results, [*both, *both, *transposed, (f, R)])
    return tuple(quantized[:4]), tuple(quantized[4:8]), tuple(quantized[8:]), jnp.sum(dweights, axis=0)


def _padded(x_RF):
    (R, F) = x_RF.shape
    return jnp.pad(x_RF, ((0, -R % BLOCK), (0, -F % BLOCK))) if R % BLOCK or F % BLOCK else x_RF


def _cut(results, sizes):
    return tuple(x[:rows, :columns] for x, (rows, columns) in zip(results, sizes, strict=True))


def _backward(g_RF, g_scales, u_RF, u_scales, da_RF, weight_R, tiles, interpret):
    """Of whole blocks; the gradient of weight_R in parts, (F/128, R).

    One kernel. Two warpgroups take a block: each computes one of the three matrices for half of the rows, quantises it
    along them, and leaves it in shared memory; then each quantises half of the columns from there.
    """
    (R, F) = g_RF.shape
    steps = math.gcd(tiles.steps, F // BLOCK)
    both = [make(R, F) for make in (values, scales, values_transposed, scales_transposed)]
    outputs = [*both, *both, values_transposed(R, F), scales_transposed(R, F), scales(R, F)]

    def kernel(g, g_scales, u, u_scales, da, weight, *rest):
        targets, buffers = rest[:len(outputs)], rest[len(outputs):]
        g_in, u_in, da_in, z, values_, scales_, values_t, scales_t, sums, arrived, met = buffers
        by_rows, by_columns = (targets[0:2], targets[4:6]), (targets[2:4], targets[6:8], targets[8:10])
        half = lax.axis_index("half")
        r, first = lax.axis_index("rows"), lax.axis_index("columns") * steps
        mine, my_rows = pl.ds(half * CHUNK, CHUNK), pl.ds(r * BLOCK + half * CHUNK, CHUNK)

        def fetch(i):
            for source, target in ((g, g_in), (u, u_in), (da, da_in)):
                plgpu.copy_gmem_to_smem(source.at[at_block(r, first + i, BLOCK)], target, arrived)

        def meet():
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)

        @pl.when(half == 0)
        def _():
            fetch(0)

        @pl.loop(0, steps)
        def _(i):
            c = first + i
            my_columns = pl.ds(c * BLOCK + half * CHUNK, CHUNK)
            plgpu.barrier_wait(arrived)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what is to be overwritten has been read

            def read(ref):
                return plgpu.load(ref.at[mine], layout=BY_ROWS).astype(jnp.float32)

            def of_rows(ref):
                vector = plgpu.load(ref, layout=BY_ROWS.reduce(1), optimized=False)
                return lax.broadcast_in_dim(vector, (CHUNK, BLOCK), [0])

            def kept():
                return (read(g_in) * of_rows(g_scales.at[c, my_rows]), read(u_in) * of_rows(u_scales.at[c, my_rows]),
                        read(da_in), of_rows(weight.at[my_rows]))

            def gradient_of_gate():
                g, u, da, weight = kept()
                return reference.gradient_of_gate(g, u, da * weight)

            def gradient_of_up():
                g, _, da, weight = kept()
                return reference.gradient_of_up(g, da * weight)

            def weighted_output():
                g, u, da, weight = kept()
                a = reference.output(g, u)
                sums[mine] = jnp.sum(a * da, axis=1)
                return a * weight

            def store(places, targets, *where):
                for place, target, at in zip(places, targets, where, strict=True):
                    plgpu.copy_smem_to_gmem(place.at[mine], target.at[at])

            for n, compute in enumerate((gradient_of_gate, gradient_of_up, weighted_output)):
                z_mine = compute()
                z[mine] = z_mine
                if n < len(by_rows):
                    values_[n, mine], scales_[n, mine] = quantized_rows(z_mine)
                plgpu.commit_smem()  # orders z, the places, and what was read before other inputs come there
                meet()
                if n < len(by_rows):
                    store((values_.at[n], scales_.at[n]), by_rows[n], (my_rows, pl.ds(c * BLOCK, BLOCK)), (c, my_rows))
                else:
                    store((sums,), targets[-1:], (c, my_rows))

                    @pl.when((half == 0) & (i + 1 < steps))
                    def _():
                        fetch(i + 1)
                z_t = plgpu.load(z.at[:, mine].T, layout=BY_COLUMNS)
                values_t[n, mine], scales_t[n, mine] = quantized_rows(z_t)
                plgpu.commit_smem()
                store((values_t.at[n], scales_t.at[n]), by_columns[n], (my_columns, pl.ds(r * BLOCK, BLOCK)),
                      (r, my_columns))
                meet()  # before z is overwritten

        plgpu.wait_smem_to_gmem(0)

    def shared(shape, dtype):
        return plgpu.SMEM(shape, dtype, transforms=without_conflicts(dtype))

    block = (BLOCK, BLOCK)
    return plgpu.kernel(
        kernel, grid=(R // BLOCK, F // BLOCK // steps), grid_names=("rows", "columns"), num_threads=WARPGROUPS,
        thread_name="half", kernel_name="swiglu_backward", interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=[
            shared(block, E4M3), shared(block, E4M3), shared(block, da_RF.dtype), shared(block, jnp.float32),
            shared((2, *block), E4M3), plgpu.SMEM((2, BLOCK), jnp.float32),
            shared((3, *block), E4M3), plgpu.SMEM((3, BLOCK), jnp.float32), plgpu.SMEM((BLOCK,), jnp.float32),
            plgpu.Barrier(num_arrivals=3), plgpu.Barrier(num_arrivals=WARPGROUPS)],
        out_type=tuple(output.array for output in outputs))(g_RF, g_scales, u_RF, u_scales, da_RF, weight_R)
