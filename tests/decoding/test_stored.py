"""Weights of a folder prepared for decoding from the dtype they are stored in: the same as by way of float32."""

import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from research.decoding import forward
from research.interop.weights import checked_weights
from tests.interop.test_huggingface import GOLDEN


def in_16_bits(name, tmp_path):
    """A golden folder whose matrices are in bfloat16, and whose norms and biases are not."""
    copy = tmp_path / name
    shutil.copytree(GOLDEN / name, copy)
    for path in copy.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({name: x.astype(ml_dtypes.bfloat16) if x.ndim == 2 else x for name, x in tensors.items()}, path)
    return copy


@pytest.mark.parametrize("name, weights", [("deepseek_v3_tiny_mtp", None), ("qwen2_tiny", None),
                                           ("qwen2_tiny", "int4")])
def test_the_way_through_float32_is_not_needed(name, weights, tmp_path, monkeypatch):
    folder = in_16_bits(name, tmp_path)
    monkeypatch.setattr(forward, "OUTPUTS", 100)  # of which a vocabulary has more
    _, model, stored = checked_weights(folder, stored=True)
    _, _, floats = checked_weights(folder)
    assert {x.dtype for x in jax.tree.leaves(floats)} == {np.dtype(np.float32)}
    assert {x.dtype for x in jax.tree.leaves(stored)} == {np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)}
    model = forward.decoding_model(model)
    found, expected = (forward.prepare(variables, model, weights) for variables in (stored, floats))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_a_wide_matrix_is_quantised_in_parts(monkeypatch):
    w_DF = np.random.default_rng(0).normal(size=(30, 250)).astype(np.float32)

    class Model:
        class products:
            dtype = np.dtype(np.float32)

    whole = forward._stored(w_DF, 4, Model)
    monkeypatch.setattr(forward, "OUTPUTS", 100)
    jax.tree.map(np.testing.assert_array_equal, forward._stored(w_DF, 4, Model), whole)
