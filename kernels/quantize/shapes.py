"""Shapes of DeepSeek-V3 that are quantised: activations and gradients of 4096 tokens and of their 8 copies, weights."""

from typing import NamedTuple


class Activation(NamedTuple):
    rows: int
    columns: int


class Weight(NamedTuple):
    experts: int
    rows: int
    columns: int


TOKENS, COPIES = 4096, 32768

# the model's width, an expert's, attention's output, the compressed queries, the compressed keys, a dense layer's
ACTIVATIONS = (
    *(Activation(TOKENS, columns) for columns in (7168, 2048, 16384, 1536, 512, 18432)),
    *(Activation(COPIES, columns) for columns in (7168, 2048)))
WEIGHTS = (
    Weight(1, 2112, 7168), Weight(1, 576, 7168), Weight(1, 24576, 1536), Weight(1, 32768, 512), Weight(1, 7168, 16384),
    Weight(1, 18432, 7168), Weight(1, 7168, 18432), Weight(8, 2048, 7168), Weight(8, 7168, 2048))
SMALL_ACTIVATION = Activation(256, 256)
SMALL_WEIGHT = Weight(2, 256, 128)
