"""Shapes of decoding with DeepSeek-V3's attention and V2-Lite's: one token a sequence, and two where one is a draft."""

from typing import NamedTuple

LATENT, ROTARY = 512, 64  # kv_lora_rank and qk_rope_head_dim of both


class Shape(NamedTuple):
    """Sequences, new tokens of each, query heads, slots of the cache, all of which are seen."""

    batch: int
    tokens: int
    heads: int
    slots: int


V3_HEADS, V2_LITE_HEADS = 128, 16
BATCHES, SLOTS = (1, 32, 128), (1024, 4096, 16384)

SHAPES = (*(Shape(batch, 1, heads, slots) for heads in (V3_HEADS, V2_LITE_HEADS) for batch in BATCHES
            for slots in SLOTS), Shape(32, 2, V3_HEADS, 4096))
SMALL = Shape(2, 1, 4, 256)
