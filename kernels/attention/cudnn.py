"""cuDNN's fused attention, through JAX: causal, 16-bit, without document masks."""

import jax
import jax.numpy as jnp

from kernels.choice import platform


def applies(q_BTNH, segments_BT) -> bool:
    """Whether this backend, dtype, head width and mask are among what cuDNN computes."""
    H = q_BTNH.shape[-1]
    return (platform() == "gpu" and q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
            and segments_BT is None and H <= 256 and H % 8 == 0)


def attention(q_BTNH, k_BTGH, v_BTGJ, scale: float):
    """See `kernels.attention.attention`. Values narrower than keys (MLA: 128 of 192) are padded with zeros."""
    H, J = q_BTNH.shape[-1], v_BTGJ.shape[-1]
    v_BTGH = jnp.pad(v_BTGJ, ((0, 0), (0, 0), (0, 0), (0, H - J)))
    o_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BTGH, v_BTGH, scale=scale, is_causal=True, implementation="cudnn")
    return o_BTNH[..., :J]
