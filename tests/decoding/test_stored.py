"""Weights of a folder prepared for decoding from the dtype they are stored in: the same as by way of float32."""

import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kernels.weight_only import Blocks
from research.decoding import forward
from research.decoding.generate import Decoder
from research.errors import RequestError
from research.interop.weights import checked_weights
from research.tree import paths
from tests.decoding.test_narrow import widened
from tests.interop.test_huggingface import GOLDEN


def in_16_bits(name, tmp_path):
    """A golden folder whose matrices are in bfloat16, and whose norms and biases are not."""
    copy = tmp_path / name
    shutil.copytree(GOLDEN / name, copy)
    for path in copy.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({name: x.astype(ml_dtypes.bfloat16) if x.ndim == 2 else x for name, x in tensors.items()}, path)
    return copy


@pytest.mark.parametrize("name, weights", [("deepseek_v3_tiny_mtp", None), ("deepseek_v3_tiny_mtp", "int8"),
                                           ("qwen2_tiny", None), ("qwen2_tiny", "int4")])
def test_the_way_through_float32_is_not_needed(name, weights, tmp_path, monkeypatch):
    folder = in_16_bits(name, tmp_path)
    monkeypatch.setattr(forward, "OUTPUTS", 100)  # of which a vocabulary has more
    _, model, stored = checked_weights(folder, stored=True)
    _, _, floats = checked_weights(folder)
    assert {x.dtype for x in jax.tree.leaves(floats)} == {np.dtype(np.float32)}
    read = [x[...] for x in jax.tree.leaves(stored)]
    assert {x.dtype for x in read} == {np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)}
    model = forward.decoding_model(model)
    found, expected = (forward.prepare(variables, model, weights) for variables in (stored, floats))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_a_release_in_fp8_is_decoded_as_it_is_stored():
    """Its bytes and scales are the folder's, and the text that of its dequantised weights; the same drafts stand."""
    folder = GOLDEN / "deepseek_v3_tiny_fp8"
    _, model, stored = checked_weights(folder, stored=True)
    _, _, floats = checked_weights(folder)
    decoders = Decoder(model, stored, weights="fp8_blocks"), Decoder(model, floats)
    layer, wide = (paths(widened(decoder.weights)["layers"][-1]["params"]) for decoder in decoders)
    last = stored["params"]["layers"]["mlp"]["down_proj"][-1]
    assert isinstance(last, Blocks) and last.values_DF.dtype == ml_dtypes.float8_e4m3fn
    jax.tree.map(np.testing.assert_array_equal, layer, wide)
    assert decoders[0].weights["layers"][-1]["params"]["mlp"]["down_proj"].format == "e4m3"
    assert forward._stored(last, "int8", model).format == "int8"  # not kept as it is, where other bits are asked for
    assert decoders[0].weights["mtp"][0]["params"]["eh_proj"]["kernel"].dtype == np.float32  # 16 bits in the release
    with pytest.raises(IndexError):
        stored["params"]["layers"]["mlp"]["down_proj"][9]
    texts = [decoder.generate([[3, 1, 4, 1, 5], [9, 2, 6]], 12, draft_tokens=1) for decoder in decoders]
    assert texts[0].tokens == texts[1].tokens and texts[0].accepted == texts[1].accepted
    assert len(set(texts[0].tokens[0])) > 2


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.2.up_proj.weight", "model.norm.weight"])
def test_what_is_not_finite_is_named_when_it_is_read(name, tmp_path):
    folder = in_16_bits("deepseek_v3_tiny_mtp", tmp_path)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name].flat[1] = np.nan
            save_file(tensors, path)
    _, model, stored = checked_weights(folder, stored=True)
    with pytest.raises(RequestError, match=f"1 not finite .*: {name}"):
        forward.prepare(stored, forward.decoding_model(model))


def test_a_wide_matrix_is_quantised_in_parts(monkeypatch):
    w_DF = np.random.default_rng(0).normal(size=(30, 250)).astype(np.float32)

    class Model:
        class products:
            dtype = np.dtype(np.float32)

    whole = forward._stored(w_DF, "int4", Model)
    monkeypatch.setattr(forward, "OUTPUTS", 100)
    jax.tree.map(np.testing.assert_array_equal, forward._stored(w_DF, "int4", Model), whole)
