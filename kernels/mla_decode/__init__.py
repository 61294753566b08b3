"""Absorbed multi-head latent attention for decoding: new tokens' queries over a cache of latents (V2 §2.1.2)."""

import jax.numpy as jnp

from kernels.choice import choose
from kernels.mla_decode import reference, xla
from kernels.mla_decode.shapes import LATENT, ROTARY

BLOCK = 64  # slots that the Hopper kernel reads at a time


def mla_decode(q_latent_BTNR, q_rope_BTNP, latent_BSR, rope_key_BSP, lengths_B, scale: float,
               implementation: str = "auto"):
    """Absorbed attention of T new tokens over a latent cache. Returns o_BTNR, values in the latent space.

    Slot s of a row of the cache is its position s; the new tokens' own are already there. lengths_B, int32: the
    position of the first new token. Token t sees the slots s <= lengths_B + t, with the score
    scale * (q_latent . latent_s + q_rope . rope_key_s); o is the mean of their latents under a softmax of the scores,
    in float32, and has q_latent's dtype. Slots that nobody sees may hold any finite numbers. implementation: see
    `kernels.choice`. Nothing here has a gradient.
    """
    operands = q_latent_BTNR, q_rope_BTNP, latent_BSR, rope_key_BSP
    chosen = choose("mla_decode", implementation, _refusal(*operands))
    if chosen == "mosaic":
        from kernels.mla_decode import mosaic  # here: importing Pallas takes a second that other runs can do without
        return mosaic.mla_decode(*operands, lengths_B, scale)
    return {"xla": xla, "reference": reference}[chosen].mla_decode(*operands, lengths_B, scale)


def _refusal(q_latent_BTNR, q_rope_BTNP, latent_BSR, rope_key_BSP) -> str | None:
    """Why the Hopper kernel does not take these; None when it does."""
    for name, x in (("queries", q_latent_BTNR), ("rotary queries", q_rope_BTNP), ("latents", latent_BSR),
                    ("rotary keys", rope_key_BSP)):
        if x.dtype != jnp.bfloat16:
            return f"its {name} are bfloat16, not {x.dtype}"
    (_, S, R), P = latent_BSR.shape, rope_key_BSP.shape[2]
    if (R, P) != (LATENT, ROTARY):
        return f"its latents have {LATENT} numbers and its rotary keys {ROTARY}, not {R} and {P}"
    if S == 0 or S % BLOCK:
        return f"its cache has a multiple of {BLOCK} slots, not {S}"
    return None
