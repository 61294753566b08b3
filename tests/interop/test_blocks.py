"""FP8 blocks: their numerics at ragged edges, what a config.json may say of them, and tensors that do not fit it."""

import json
import shutil
from functools import partial

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from kernels.quantize import reference
from research.errors import RequestError
from research.interop import blocks, transfer
from research.interop.huggingface import read_settings
from research.interop.names import SCALE, Place
from research.interop.tensors import Tensor, list_tensors
from research.interop.variables import Array, Stored
from tests.interop.test_huggingface import GOLDEN, read_variables

FP8 = GOLDEN / "deepseek_v3_tiny_fp8"
Q_A, GATE = "model.layers.1.self_attn.q_a_proj.weight", "model.layers.0.mlp.gate_proj.weight"


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32 - 1), st.booleans())
@example(1, 1, 0, True)
@example(129, 257, 1, False)
@hypothesis_settings(max_examples=6)
def test_ragged_blocks_are_the_references(R, C, seed, zeros):
    random = np.random.default_rng(seed)
    w_RC = random.normal(size=(R, C)).astype(np.float32) * np.float32(10.0) ** random.integers(-30, 4, (R, 1))
    w_RC = w_RC.astype(np.float32)
    if zeros:
        w_RC[:128, :128] = 0
    values_RC, scales = blocks.quantize(w_RC)
    assert scales.shape == blocks.scale_shape((R, C)) and scales.dtype == np.float32
    expected = jax.jit(partial(reference.quantize, tile=(128, 128)))(w_RC)
    np.testing.assert_array_equal(values_RC.view(np.uint8), np.asarray(expected[0]).view(np.uint8))
    np.testing.assert_array_equal(scales.T, expected[1])
    back_RC = blocks.dequantize(values_RC, scales)
    spread_RC = scales[np.arange(R)[:, None] // 128, np.arange(C)[None] // 128]
    np.testing.assert_array_equal(back_RC, values_RC.astype(np.float32) * spread_RC)
    again = blocks.quantize(back_RC)
    np.testing.assert_array_equal(again[0].view(np.uint8), values_RC.view(np.uint8))
    np.testing.assert_array_equal(again[1], scales)


def test_stacks_are_dequantised_one_by_one():
    random = np.random.default_rng(0)
    pairs = [blocks.quantize(random.normal(size=(130, 200)).astype(np.float32)) for _ in range(3)]
    values, scales = (np.stack(parts) for parts in zip(*pairs, strict=True))
    np.testing.assert_array_equal(blocks.dequantize(values, scales), [blocks.dequantize(*pair) for pair in pairs])


@pytest.mark.parametrize("narrow", (True, False), ids=("FP8", "float32"))
def test_what_devices_hold_is_read_in_pieces_and_nothing_else(narrow, tmp_path, monkeypatch):
    """Ragged blocks of a matrix that we hold transposed, (in, out); parts that begin within a block, and one twice."""
    monkeypatch.setattr(transfer, "AT_ONCE", 1)
    random = np.random.default_rng(0)
    x_RC = random.normal(size=(400, 200)).astype(np.float32) * np.exp2(np.arange(400, dtype=np.float32)[:, None] // 64)
    values_RC, scales = blocks.quantize(x_RC)
    wide_RC = blocks.dequantize(values_RC, scales) if narrow else x_RC
    save_file({"w": values_RC, f"w{SCALE}": scales} if narrow else {"w": x_RC}, tmp_path / "model.safetensors")
    array = Stored(tmp_path, Array("params/w", (1, 200, 400), (Place("w", (0,), True),)), list_tensors(tmp_path))
    read, real = [], Tensor.read
    monkeypatch.setattr(Tensor, "read", lambda self, *rows: read.append(rows) or real(self, *rows))
    monkeypatch.setattr(jax, "make_array_from_callback", lambda _, sharding, give: [give(at) for at in sharding.all])

    class Sharding:
        def __init__(self, *parts):
            self.all = [(slice(None), *parts) for parts in parts]

        def addressable_devices_indices_map(self, shape):
            return dict(enumerate(self.all))

    parts = (slice(0, 100), slice(150, 300)), (slice(100, 200), slice(150, 300)), (slice(0, 100), slice(150, 300))
    for found, (C, R) in zip(array.split(Sharding(*parts), []), parts, strict=True):
        np.testing.assert_array_equal(found[0], wide_RC[R, C].T)
    assert read == ([(), (128, 256), (256, 300)] if narrow else [(150, 256), (256, 300)])
    np.testing.assert_array_equal(array.split(Sharding((slice(None), slice(None))), [])[0][0], wide_RC.T)
    np.testing.assert_array_equal(array.read((), [], np.dtype(np.float32))[0], wide_RC.T)


def test_what_is_finite():
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
        values = np.array([[1, -448, 0]], np.float32).astype(dtype)
        assert blocks.finite(values) and blocks.finite(values[:0])
        for bad in (np.nan, -np.nan):
            assert not blocks.finite(np.array([[1, bad]], np.float32).astype(dtype))


def changed(to, tensors=None, config=None):
    """The FP8 folder in one file with other tensors (None: without) and other keys in its config.json."""
    to.mkdir()
    weights = {name: tensor.read() for name, tensor in list_tensors(FP8).items()} | (tensors or {})
    save_file({name: value for name, value in weights.items() if value is not None}, to / "model.safetensors")
    raw = json.loads((FP8 / "config.json").read_text()) | (config or {})
    (to / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return to


def nan(name, place):
    value = list_tensors(FP8)[name].read()
    value[place] = np.nan
    return {name: value}


WRONG_TENSORS = {
    "a weight without its scales": ({f"{Q_A}_scale_inv": None}, f"1 in F8_E4M3 without their scales: {Q_A}"),
    "scales without their weight": ({Q_A: None}, f"1 missing: {Q_A}; 1 scales without a weight in F8_E4M3: {Q_A}_"),
    "scales of a weight in 32 bits": ({Q_A: np.zeros((24, 64), np.float32)},
                                      f"1 scales without a weight in F8_E4M3: {Q_A}_scale_inv"),
    "scales of another shape": ({f"{Q_A}_scale_inv": np.ones((1, 2), np.float32)},
                                f"{Q_A}_scale_inv is [1, 2] and must be [1, 1]"),
    "scales the wrong way round": (
        {f"{GATE}_scale_inv": np.ones((1, 2), np.float32)}, f"{GATE}_scale_inv is [1, 2] and must be [2, 1]"),
    "scales in E8M0": ({f"{Q_A}_scale_inv": np.ones((1, 1), ml_dtypes.float8_e8m0fnu)},
                       f"{Q_A}_scale_inv is F8_E8M0 and must be F32"),
    "scales in 16 bits": ({f"{Q_A}_scale_inv": np.ones((1, 1), ml_dtypes.bfloat16)},
                          f"{Q_A}_scale_inv is BF16 and must be F32"),
    "a norm in FP8": ({"model.norm.weight": np.ones(64, ml_dtypes.float8_e4m3fn)},
                      "model.norm.weight is F8_E4M3 and must be F32, F16, BF16"),
    "a weight in E5M2": ({Q_A: np.zeros((24, 64), ml_dtypes.float8_e5m2)}, f"{Q_A} is F8_E5M2 and must be"),
    "a NaN among the values": (nan(Q_A, (3, 5)), f"1 not finite (NaN or infinite values): {Q_A}"),
    "a NaN among the scales": (nan(f"{Q_A}_scale_inv", (0, 0)),
                               f"1 not finite (NaN or infinite values): {Q_A}_scale_inv"),
}


@pytest.mark.parametrize("what", WRONG_TENSORS)
def test_tensors_that_are_no_blocks_are_named(what, tmp_path):
    tensors, expected = WRONG_TENSORS[what]
    folder = changed(tmp_path / "a", tensors)
    with pytest.raises(RequestError) as caught:
        read_variables(folder, read_settings(folder))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


BLOCKS = json.loads((FP8 / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("given, expected", [
    (None, "lacks quantization_config, and model.layers.0.mlp.down_proj.weight and"),
    ("fp8", "quantization_config='fp8' must be an object"),
    (BLOCKS | {"quant_method": "gptq"}, "quantization_config.quant_method='gptq' is not supported: it must be 'fp8'"),
    (BLOCKS | {"fmt": "e5m2"}, "quantization_config.fmt='e5m2'"),
    (BLOCKS | {"weight_block_size": [64, 128]}, "quantization_config.weight_block_size=[64, 128]"),
    (BLOCKS | {"activation_scheme": "static"}, "quantization_config.activation_scheme='static'"),
    (BLOCKS | {"scale_fmt": "float"}, "quantization_config.scale_fmt='float'"),
    (BLOCKS | {"scale_fmt": "ue8m0", "more": 1}, "quantization_config.more=1"),
    ({"quant_method": "fp8"}, "lacks quantization_config.fmt"),
])
def test_another_quantization_is_refused(given, expected, tmp_path):
    folder = changed(tmp_path / "a", config={"quantization_config": given})
    with pytest.raises(RequestError, match="config.json") as caught:
        read_settings(folder)
    assert expected in str(caught.value)


def test_announced_blocks_that_are_not_there_are_warned_of(tmp_path, caplog):
    shutil.copytree(GOLDEN / "deepseek_v3_tiny_mtp", tmp_path / "a")
    raw = json.loads((tmp_path / "a" / "config.json").read_text()) | {"quantization_config": BLOCKS}
    (tmp_path / "a" / "config.json").write_text(json.dumps(raw))
    read_settings(tmp_path / "a")
    assert "announces FP8 blocks" in caplog.text
