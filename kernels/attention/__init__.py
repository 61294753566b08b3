"""Causal softmax attention over packed documents, for training and prefill."""

from kernels.attention import cached, cudnn, reference, xla
from kernels.choice import Unavailable, platform

cached_attention = cached.attention
IMPLEMENTATIONS = ("auto", "xla", "cudnn", "reference")


def attention(q_BTNH, k_BTGH, v_BTGJ, segments_BT, scale: float, implementation: str = "auto"):
    """softmax(scale * q k^T) v over earlier positions of the same segment. Returns o_BTNJ.

    Query head n reads key head n // (N/G); values may be narrower (J) than keys (H). segments_BT: None when every
    position may see every earlier one. implementation: `auto` is `cudnn` on an NVIDIA GPU where its shapes, dtype
    and mask allow, otherwise `xla`, which never holds the whole T x T matrix on a GPU. A `cudnn` that is asked for
    takes each row for one document (the config refuses it where rows hold several); Unavailable where it cannot run.
    """
    refusal = cudnn.refusal(q_BTNH)
    if implementation == "auto":
        implementation = "cudnn" if refusal is None and segments_BT is None else "xla"
    if implementation == "cudnn":
        if refusal is not None:
            raise Unavailable("attention", implementation, refusal)
        return cudnn.attention(q_BTNH, k_BTGH, v_BTGJ, scale)
    if implementation == "reference":
        return reference.attention(q_BTNH, k_BTGH, v_BTGJ, segments_BT, scale)
    return xla.attention(q_BTNH, k_BTGH, v_BTGJ, segments_BT, scale, recompute=platform() != "cpu")
