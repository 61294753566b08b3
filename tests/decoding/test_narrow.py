"""Decoding with matrices in 8 and 4 bits, experts' too: the text that the dequantised weights have."""

from functools import partial

import jax
import pytest

from kernels.weight_only import Narrow, dequantize
from research.decoding.forward import decoding_model, prepare, storage
from research.decoding.generate import Decoder
from tests import tiny
from tests.decoding.models import built

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]


def is_narrow(x) -> bool:
    return isinstance(x, Narrow)


def widened(weights):
    """The same in floats: what it stands for in place of each quantised matrix."""
    wide = jax.tree.map(lambda x: dequantize(x) if is_narrow(x) else x, weights, is_leaf=is_narrow)
    if is_narrow(weights["embed_tokens"]):
        wide |= {"embed_tokens": wide["embed_tokens"].T, "lm_head": wide.get("lm_head", wide["embed_tokens"])}
    return wide


def narrow(weights: str, changes: dict):
    _, model, variables = built(tuple(changes.items()))
    return model, jax.jit(partial(prepare, model=decoding_model(model), weights=weights))(variables(0))


def test_text_is_that_of_the_dequantised_weights():
    model, kept = narrow("int4", tiny.DENSE | {"model.tie_word_embeddings": True})
    assert "lm_head" not in kept
    texts = [Decoder(model, w).generate(PROMPTS, 12) for w in (kept, widened(kept))]
    assert texts[0].tokens == texts[1].tokens
    assert len(set(texts[0].tokens[0])) > 2  # a text that a wrong product would change


def test_every_matrix_is_quantised_and_nothing_else():
    _, kept = narrow("int4", tiny.DENSE)
    found = jax.tree.leaves(kept, is_leaf=lambda x: isinstance(x, Narrow))
    assert sum(isinstance(x, Narrow) for x in found) == 2 * 7 + 2  # four of attention, three of the feed-forward
    assert all(x.ndim == 1 for x in found if not isinstance(x, Narrow))
    assert kept["embed_tokens"].format == "int8" and kept["lm_head"].format == "int4"


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8_blocks"])
def test_text_of_narrow_experts_is_that_of_the_dequantised_ones(weights):
    """Prompts of several tokens, then plain and drafted ones: the multi-token module's experts are narrow as well."""
    model, kept = narrow(weights, {})
    assert is_narrow(kept["layers"][-1]["params"]["mlp"]["gate_proj"]) and is_narrow(
        kept["mtp"][0]["params"]["block"]["mlp"]["down_proj"])
    texts = [Decoder(model, w).generate(PROMPTS, 12, draft_tokens=1) for w in (kept, widened(kept))]
    assert texts[0].tokens == texts[1].tokens and texts[0].accepted == texts[1].accepted
    assert len({*texts[0].tokens[0], *texts[0].tokens[1]}) > 2


def test_unknown_formats_are_refused():
    with pytest.raises(ValueError, match="weights='int2' must be one of int8, int4, fp8_blocks"):
        storage(built()[1], "int2")
