"""The cache of decoding: for each attention, what it keeps of the tokens before.

Latent attention keeps the normed latent (R numbers a token) and the rotated rotary key (P); grouped-query attention
keeps keys and values. Slot s of a row holds position s of its sequence. A query never sees beyond its own position, so
that taking tokens back is only a matter of going on from an earlier position.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from kernels.quantize import dequantize, quantize
from research.parallel.rules import of_cache, over_cache

# fp8: E4M3 with a float32 scale for 128 numbers of a token, the rotary key in bfloat16: of V3's 656 bytes a token and
# layer, as FlashMLA stores them
STORAGE = ("float32", "bfloat16", "fp8")
UNROLLED_ROWS = 16  # updates of a wider batch are a loop: 128 of them take half a minute to compile
WHOLE_IN_FP8 = ("rope_key",)  # position is all that these 64 numbers carry: 16 bits, as serving engines keep them


@struct.dataclass
class Rows:
    """The slots of one attention: arrays (B, S, ...), by name; what is in 8 bits has its scales beside it."""

    arrays: dict[str, jax.Array]
    scales: dict[str, jax.Array]
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)

    def append(self, positions_BT, **new) -> "Rows":
        """The rows with (B, T, ...) arrays written to the slots of consecutive positions, from positions_BT[:, 0]."""
        arrays, scales = dict(self.arrays), dict(self.scales)
        for name, values in new.items():
            if name in scales:
                values, of_tiles = over_cache(self.mesh, name, _quantized, values)
                scales[name] = over_cache(self.mesh, name, _write, scales[name], of_tiles, positions_BT[:, 0])
            arrays[name] = over_cache(self.mesh, name, _write, arrays[name], values, positions_BT[:, 0])
        return Rows(arrays, scales, self.mesh)

    def read(self, name: str) -> jax.Array:
        """All slots (B, S, ...): float32 or bfloat16 as they are stored; what is in 8 bits comes in bfloat16."""
        values = self.arrays[name]
        return over_cache(self.mesh, name, _dequantized, values, self.scales[name]) if name in self.scales else values


def _write(slots, new, start_B):
    """`new` (B, T, ...) at slots start_B, ..., start_B + T - 1 of each row of `slots` (B, S, ...)."""
    # fused with a reader, the update would be made in a copy for it alone
    return jax.lax.optimization_barrier(write_rows(slots, new.astype(slots.dtype), start_B))


def write_rows(array, new, start_B):
    """`array` (B, S, ...) with `new` (B, T, ...) at start_B, ... of each row: one update in place each, as a scatter
    would copy or loop over single elements."""
    def write(b, array):
        at = (b, start_B[b]) + (0,) * (array.ndim - 2)
        return jax.lax.dynamic_update_slice(array, jax.lax.dynamic_slice_in_dim(new, b, 1), at)

    B = new.shape[0]
    if B <= UNROLLED_ROWS:
        for b in range(B):
            array = write(b, array)
        return array
    return jax.lax.fori_loop(0, B, write, array)


def _quantized(values):
    """(B, T, ..., C) to E4M3 and float32 scales (B, T, ..., tiles of 128 along C)."""
    flat = values.reshape(-1, values.shape[-1])
    quantized, scales_CX = quantize(flat, (1, 128))
    return quantized.reshape(values.shape), scales_CX.T.reshape(*values.shape[:-1], -1)


def _dequantized(values, scales):
    flat, C = values.reshape(-1, values.shape[-1]), scales.shape[-1]
    return dequantize(flat, scales.reshape(-1, C).T, (1, 128)).astype(jnp.bfloat16).reshape(values.shape)


def widths(config) -> dict[str, tuple[int, ...]]:
    """Shape of what one attention keeps of a token, by name."""
    if config.attention == "mla":
        return {"latent": (config.kv_lora_rank,), "rope_key": (config.qk_rope_head_dim,)}
    return dict.fromkeys(("key", "value"), (config.num_key_value_heads, config.head_dim))


def empty_rows(config, batch: int, slots: int, storage: str, mesh: Mesh | None = None) -> Rows:
    """Rows of one attention without a token, over a mesh or on one device. storage: one of STORAGE."""
    arrays, scales = {}, {}
    for name, shape in widths(config).items():
        dtype = jnp.dtype(storage) if storage != "fp8" else jnp.bfloat16
        if storage == "fp8" and name not in WHOLE_IN_FP8:
            dtype = jnp.float8_e4m3fn
            scales[name] = jnp.zeros((batch, slots, *shape[:-1], -(-shape[-1] // 128)), jnp.float32)
        arrays[name] = jnp.zeros((batch, slots, *shape), dtype)
    if mesh is not None:
        arrays, scales = ({name: jax.lax.with_sharding_constraint(x, of_cache(mesh, name)) for name, x in of.items()}
                          for of in (arrays, scales))
    return Rows(arrays, scales, mesh)


def empty_cache(model, batch: int, slots: int, storage: str) -> dict[str, list[Rows]]:
    """{`layers`: rows of each layer, `mtp`: of each multi-token module}."""
    depths = {"layers": model.config.num_hidden_layers, "mtp": model.mtp.num_nextn_predict_layers}
    return {name: [empty_rows(model.config, batch, slots, storage, model.products.mesh) for _ in range(number)]
            for name, number in depths.items()}


def bytes_per_token(model, storage: str) -> int:
    """Of the main model's cache, its scales included; V3 in bfloat16: 70,272."""
    rows = jax.eval_shape(lambda: empty_rows(model.config, 1, 1, storage))
    return model.config.num_hidden_layers * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(rows))
