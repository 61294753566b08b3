"""cuDNN's fused attention, through JAX: causal, 16-bit, without document masks."""

import jax
import jax.numpy as jnp

from kernels.choice import platform


def refusal(q_BTNH) -> str | None:
    """What about the backend, dtype or head width is not among what cuDNN computes; None when all of it is."""
    H = q_BTNH.shape[-1]
    if platform() != "gpu":
        return f"the default device is a {platform()}, not a GPU"
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in 16 bits, not in {q_BTNH.dtype}"
    return f"heads of width {H} are no multiple of 8 up to 256" if H > 256 or H % 8 else None


def attention(q_BTNH, k_BTGH, v_BTGJ, scale: float):
    """See `kernels.attention.attention`. Values narrower than keys (MLA: 128 of 192) are padded with zeros."""
    H, J = q_BTNH.shape[-1], v_BTGJ.shape[-1]
    v_BTGH = jnp.pad(v_BTGJ, ((0, 0), (0, 0), (0, 0), (0, H - J)))
    o_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BTGH, v_BTGH, scale=scale, is_causal=True, implementation="cudnn")
    return o_BTNH[..., :J]
