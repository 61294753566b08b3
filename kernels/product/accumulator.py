"""Hopper's tensor cores as they add: 32 products aligned to the largest exponent, cut to 14 bits, as the sum is.

V3 §3.3.2 describes it ("retaining around 14 bits"); public measurements on an H100 find 13 stored bits and the hidden
one, cut, not rounded. `python -m kernels.product.accumulator` prints what that costs, and what promotion saves.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax

from kernels import command
from kernels.product.reference import row_scales
from kernels.quantize import reference as quantize

GROUP = 32  # products that the tensor cores add at once
BITS = 14  # of each, and of the sum, counted from the largest one's first
SMALLEST = 2.0**-100  # sums below it lose bits: their last ones are no float32


def _unit(magnitude):
    """The value of the last of BITS bits of a number of this magnitude, a power of two."""
    bits = lax.bitcast_convert_type(jnp.maximum(magnitude, SMALLEST), jnp.uint32) & jnp.uint32(0x7F800000)
    return lax.bitcast_convert_type(bits, jnp.float32) * 2.0 ** (1 - BITS)


def _add_group(total_RS, a_RG, b_GS):
    """total + a b of one group. The cut numbers are at most 2^14 of a unit each, so float32 adds all 33 exactly."""
    products = [a_RG[:, i, None] * b_GS[None, i] for i in range(a_RG.shape[1])]  # unrolled: one loop over R and S
    largest = jnp.abs(total_RS)
    for product_RS in products:
        largest = jnp.maximum(largest, jnp.abs(product_RS))
    unit = _unit(largest)
    inverse = 1 / unit  # exact, and ten times as fast as dividing each product
    units = jnp.trunc(total_RS * inverse)
    for product_RS in products:
        units = units + jnp.trunc(product_RS * inverse)
    sums = units * unit
    unit = _unit(jnp.abs(sums))
    return jnp.trunc(sums * (1 / unit)) * unit


def product(a_RC, scales_a, tile_a, b_SC, scales_b, tile_b, promote: int | None = None):
    """The reference's product as Hopper would add it: float32 y_RS.

    promote: after so many of C, a multiple of 32, the tensor cores' sum is added to one in float32 and starts again;
    None: never. Scales multiply that sum where none changes within it, as the kernels do it; otherwise the products
    before they are added, which no hardware does, but without which tiles could not be added up at all.
    """
    (R, C), S = a_RC.shape, b_SC.shape[0]
    span = -(-C // GROUP) * GROUP if promote is None else promote
    if span % GROUP or span <= 0:
        raise ValueError(f"promote={promote}: expected a positive multiple of {GROUP}, or None")
    spans = -(-C // span)
    if all(width % span == 0 or width >= C for _, width in (tile_a, tile_b)):
        a_RC, b_SC = a_RC.astype(jnp.float32), b_SC.astype(jnp.float32)
        sa, sb = row_scales(scales_a, tile_a, R, C, span), row_scales(scales_b, tile_b, S, C, span)
    else:
        a_RC, b_SC = quantize.dequantize(a_RC, scales_a, tile_a), quantize.dequantize(b_SC, scales_b, tile_b)
        sa, sb = jnp.ones((spans, R), jnp.float32), jnp.ones((spans, S), jnp.float32)
    shape = spans, span // GROUP, GROUP
    a = jnp.pad(a_RC, ((0, 0), (0, spans * span - C))).reshape(R, *shape).transpose(1, 2, 0, 3)
    b = jnp.pad(b_SC, ((0, 0), (0, spans * span - C))).reshape(S, *shape).transpose(1, 2, 3, 0)
    zeros_RS = jnp.zeros((R, S), jnp.float32)

    def add_span(y_RS, operands):
        *groups, sa_R, sb_S = operands
        sums_RS, _ = lax.scan(lambda total, group: (_add_group(total, *group), None), zeros_RS, tuple(groups))
        return y_RS + sums_RS * (sa_R[:, None] * sb_S[None]), None

    return lax.scan(add_span, zeros_RS, (a, b, sa, sb))[0]


MEASURES = {
    "norm of error / norm": lambda e, y: np.linalg.norm(e) / np.linalg.norm(y),
    "largest error / largest": lambda e, y: np.max(np.abs(e)) / np.max(np.abs(y)),
    "mean of |error / entry|": lambda e, y: np.mean(np.abs(e / y)),
    "largest |error / entry|": lambda e, y: np.max(np.abs(e / y)),
}
DATA = {"normal": lambda rng, shape: rng.normal(size=shape), "uniform 0..1": lambda rng, shape: rng.uniform(size=shape)}


def errors(data: str, width: int, promote: int | None, seed: int, size: int = 64) -> dict[str, float]:
    """Each measure of the accumulation's error alone: against float64 products of the same E4M3 values."""
    rng = np.random.default_rng(seed)
    operands = []
    for _ in range(2):
        x = jnp.asarray(DATA[data](rng, (size, width)), jnp.float32)
        operands += [*quantize.quantize(x, x.shape), x.shape]
    exact = np.asarray(operands[0], np.float64) @ np.asarray(operands[3], np.float64).T
    exact *= float(operands[1][0, 0]) * float(operands[4][0, 0])
    found = np.asarray(jax.jit(product, static_argnums=(2, 5, 6))(*operands, promote), np.float64)
    return {name: float(measure(found - exact, exact)) for name, measure in MEASURES.items()}


def main() -> None:
    print(f"Error of {BITS}-bit accumulation in percent, 64 x 64 sums of E4M3 products, mean of 3 draws (least - most)")
    print(f"\n{'data':<14}{'K':>6}{'promoted':>10}" + "".join(f"{name:>27}" for name in MEASURES))
    for data in DATA:
        for width in (4096, 7168):
            for promote in (128, None):
                rows = [errors(data, width, promote, seed) for seed in range(3)]
                cells = []
                for name in MEASURES:
                    values = [100 * row[name] for row in rows]
                    cells.append(f"{np.mean(values):.3g} ({min(values):.3g} - {max(values):.3g})")
                when = "never" if promote is None else f"every {promote}"
                print(f"{data:<14}{width:>6}{when:>10}" + "".join(f"{cell:>27}" for cell in cells))
    print("\nV3 §3.3.2: two random matrices, K = 4096, a maximum relative error of nearly 2%. Which random numbers and"
          "\nwhich relative error it does not say. Entries of normal data may be near zero: see the last column.")


if __name__ == "__main__":
    command.run(main, flags.FlagValues())
