"""Decoding with weights in 8 and 4 bits: the text that the dequantised weights have, and what is refused."""

from functools import partial

import jax
import pytest

from kernels.weight_only import Narrow, dequantize
from research.decoding.forward import decoding_model, prepare, storage
from research.decoding.generate import Decoder
from tests import tiny
from tests.decoding.models import built

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]


def widened(weights):
    """The same in floats: what it stands for in place of each quantised matrix."""
    def widen(x):
        return dequantize(x) if isinstance(x, Narrow) else x

    wide = jax.tree.map(widen, weights, is_leaf=lambda x: isinstance(x, Narrow))
    return wide | {"embed_tokens": wide["embed_tokens"].T, "lm_head": wide.get("lm_head", wide["embed_tokens"])}


def narrow(weights: str, changes: dict):
    _, model, variables = built(tuple((tiny.DENSE | changes).items()))
    return model, jax.jit(partial(prepare, model=decoding_model(model), weights=weights))(variables(0))


def test_text_is_that_of_the_dequantised_weights():
    model, kept = narrow("int4", {"model.tie_word_embeddings": True})
    assert "lm_head" not in kept
    texts = [Decoder(model, w).generate(PROMPTS, 12) for w in (kept, widened(kept))]
    assert texts[0].tokens == texts[1].tokens
    assert len(set(texts[0].tokens[0])) > 2  # a text that a wrong product would change


def test_every_matrix_is_quantised_and_nothing_else():
    _, kept = narrow("int4", {})
    found = jax.tree.leaves(kept, is_leaf=lambda x: isinstance(x, Narrow))
    assert sum(isinstance(x, Narrow) for x in found) == 2 * 7 + 2  # four of attention, three of the feed-forward
    assert all(x.ndim == 1 for x in found if not isinstance(x, Narrow))
    assert kept["embed_tokens"].bits == 8 and kept["lm_head"].bits == 4


def test_routed_experts_are_refused():
    with pytest.raises(ValueError, match="weights='int8' needs a model without routed experts: it has 8"):
        storage(built()[1], "int8")
    with pytest.raises(ValueError, match="weights='int2' must be one of int8, int4"):
        storage(built()[1], "int2")
