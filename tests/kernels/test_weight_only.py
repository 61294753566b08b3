"""Weight-only quantisation: the error of the formats, the products' equality with the definition, ragged shapes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import choice
from kernels import cpp as made
from kernels.weight_only import (
    FORMATS,
    Blocks,
    Narrow,
    dequantize,
    native,
    of_blocks,
    product,
    quantize,
    reference,
    rows,
    xla,
)
from research.interop import blocks

GROUPS = (("int8", None), ("int8", 16), ("int4", None), ("int4", 16))


@pytest.fixture(scope="module")
def cpp():
    """The implementation in C++; where there is no compiler, what stands in for it."""
    return "auto" if made.refusal(native.SOURCE) else "native"


def matrix(inputs: int, outputs: int, seed: int = 0):
    """Rows of very different magnitudes, a column of zeros, one huge weight."""
    rng = np.random.default_rng(seed)
    w_DF = rng.normal(size=(inputs, outputs)) * 10 ** rng.uniform(-3, 3, (inputs, 1))
    w_DF[:, 0] = 0
    w_DF[0, -1] = 1e6
    return jnp.asarray(w_DF, jnp.float32)


@pytest.mark.parametrize(("format", "group"), GROUPS)
def test_an_error_is_half_a_step_of_its_group_at_the_most(format, group):
    w_DF = matrix(50, 7)
    w = quantize(w_DF, format, group)
    steps_GF = np.repeat(np.asarray(w.scales_GF), w.group, axis=0)[:50]
    error_DF = np.abs(np.asarray(dequantize(w)) - np.asarray(w_DF))
    assert np.all(error_DF <= steps_GF * 0.5001)
    for start in range(0, 50, w.group):  # the scale is the largest magnitude's, of its own group alone
        largest_F = np.max(np.abs(np.asarray(w_DF)[start:start + w.group]), axis=0)[1:]
        np.testing.assert_allclose(steps_GF[start, 1:], largest_F / reference.LARGEST[format], rtol=1e-6)
    assert not np.any(np.asarray(dequantize(w))[:, 0])


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_values_on_the_grid_come_back(format):
    """And twice quantised is once quantised, each nibble in its place."""
    largest = reference.LARGEST[format]
    w_DF = np.random.default_rng(1).integers(-largest, largest + 1, (64, 5)).astype(np.float32)
    w_DF[0] = largest
    w = quantize(w_DF, format)
    np.testing.assert_array_equal(dequantize(w), w_DF)
    assert w.values_GFY.dtype == jnp.int8 and w.nbytes == 64 * 5 // (2 if format == "int4" else 1) + 4 * 5
    assert w.shape == (64, 5)


@given(rows_=st.integers(1, 3), inputs=st.integers(1, 70), outputs=st.integers(2, 9), chosen=st.sampled_from(GROUPS),
       seed=st.integers(0, 99))
@settings(max_examples=3, deadline=None)
def test_product_is_the_definitions(rows_, inputs, outputs, chosen, seed):
    format, group = chosen
    w = quantize(matrix(inputs, outputs, seed), format, group or (inputs + inputs % 2))
    x_XD = jnp.asarray(np.random.default_rng(seed).normal(size=(rows_, inputs)), jnp.float32)
    assert_product(x_XD, w, product(x_XD, w, implementation="xla"))


def assert_product(x_XD, w, y_XF):
    """Against float64, to what float32 sums of 16 times as large parts may err."""
    w_DF = np.asarray(dequantize(w), np.float64)
    exact = np.asarray(x_XD, np.float64) @ w_DF
    sizes = np.abs(np.asarray(x_XD, np.float64)) @ np.abs(w_DF)
    largest_F = np.max(np.abs(w_DF), axis=0, keepdims=True) * np.abs(np.asarray(x_XD)).sum(1, keepdims=True)
    assert np.all(np.abs(np.asarray(y_XF) - exact) <= 2e-6 * (sizes + largest_F))
    assert y_XF.dtype == jnp.float32 and y_XF.shape == exact.shape


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_many_rows_share_blocks_whose_last_overlaps(format):
    w = quantize(matrix(70, 11), format, 16)
    x_XD = jnp.asarray(np.random.default_rng(2).normal(size=(xla.FEW + 1, 70)), jnp.float32)
    y_XF = product(x_XD, w, implementation="xla")
    assert_product(x_XD, w, y_XF)
    assert_product(x_XD, w, product(x_XD, w, implementation="reference"))
    x_XGC = jnp.pad(x_XD, ((0, 0), (0, 10))).reshape(-1, 5, 16)
    assert_product(x_XD, w, xla._blocks(x_XGC, w, 4))


def test_rows_are_outputs():
    w = quantize(matrix(22, 9), "int4", 16, "bfloat16")
    at = jnp.array([[3, 8], [0, 3]])
    expected = np.asarray(dequantize(w)).T[np.asarray(at)]
    assert rows(w, at).dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows(w, at), expected.astype(jnp.bfloat16))


@pytest.mark.parametrize("implementation", ["xla", "cpp"])
@pytest.mark.parametrize(("format", "group"), (("int8", None), ("int4", 64)))
def test_a_loop_of_one_row_makes_no_copy_of_the_matrix(format, group, implementation, request):
    """The reason for XLA's formulation: it keeps no temporary of the matrix's size, within a loop or before it."""
    implementation = request.getfixturevalue("cpp") if implementation == "cpp" else implementation
    w = jax.eval_shape(lambda: quantize(jnp.zeros((512, 512)), format, group))

    def loop(x_XD, w):
        step = partial(product, w=w, implementation=implementation)
        return jax.lax.while_loop(lambda x_XD: x_XD[0, 0] < 1, step, x_XD)

    compiled = jax.jit(loop).lower(jax.ShapeDtypeStruct((1, 512), jnp.float32), w).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * 512 // 4


def test_refused():
    with pytest.raises(ValueError, match="group=15 must be even"):
        quantize(jnp.ones((30, 4)), "int4", 15)


def drawn(inputs: int, outputs: int, format: str, group: int, seed: int, *stack: int) -> Narrow:
    """A matrix, or a stack of them, of any bytes but NaN: no compilation."""
    rng = np.random.default_rng(seed)
    size = *stack, -(-inputs // group), outputs
    values_GFY = rng.integers(-128, 128, (*size, group // (2 if format == "int4" else 1)), np.int8)
    if format == "e4m3":
        values_GFY[(values_GFY & 0x7F) == 0x7F] = 1  # below the smallest normal number
    return Narrow(values_GFY, rng.uniform(0.1, 1, size).astype(np.float32), format, inputs, "float32")


def written_out(w: Narrow):
    """The matrices (E, D, F) of a stack, float64."""
    numbers = {"int8": lambda x: x, "int4": lambda x: np.concatenate([(x & 15) - 8, x >> 4], axis=-1),
               "e4m3": lambda x: x.view(ml_dtypes.float8_e4m3fn).astype(np.float64)}[w.format](w.values_GFY)
    w_EGFC = numbers * w.scales_GF[..., None].astype(np.float64)
    return w_EGFC.swapaxes(-1, -2).reshape(len(w_EGFC), -1, w.shape[-1])[:, :w.inputs]


@given(rows_=st.integers(0, 20), inputs=st.integers(1, 1200), outputs=st.integers(1, 140), matrices=st.integers(1, 3),
       format=st.sampled_from(FORMATS), half=st.one_of(st.integers(1, 80), st.just(600)), seed=st.integers(0, 99))
@example(rows_=8, inputs=1200, outputs=140, matrices=1, format="int8", half=600, seed=0)  # spans, and other threads
@example(rows_=5, inputs=512, outputs=63, matrices=1, format="int4", half=64, seed=0)
@example(rows_=1, inputs=1, outputs=1, matrices=1, format="int4", half=1, seed=0)
@example(rows_=20, inputs=300, outputs=70, matrices=1, format="e4m3", half=64, seed=0)
@settings(max_examples=20, deadline=None)
def test_cpps_product_is_the_definitions(cpp, rows_, inputs, outputs, matrices, format, half, seed):
    """Every row with its own matrix of a stack; neighbours share one, or do not."""
    w = drawn(inputs, outputs, format, 128 if format == "e4m3" else 2 * half, seed, matrices)
    rng = np.random.default_rng(seed)
    x_XD = rng.normal(size=(rows_, inputs)).astype(np.float32)
    matrix_X = np.sort(rng.integers(0, matrices, rows_)).astype(np.int32)[::rng.choice([1, -1])]
    w_XDF = written_out(w)[matrix_X]
    exact, sizes = (np.einsum("XD,XDF->XF", *each) for each in ((x_XD, w_XDF), (np.abs(x_XD), np.abs(w_XDF))))
    products = [product(x_XD, w, matrix_X, cpp)]
    if matrices == 1:
        products.append(product(x_XD, jax.tree.map(lambda x: x[0], w), implementation=cpp))
    for y_XF in products:
        assert y_XF.dtype == jnp.float32 and y_XF.shape == (rows_, outputs)
        assert np.all(np.abs(y_XF - exact) <= 2e-6 * sizes)


def test_every_finite_code_of_e4m3(cpp):
    """One at a time: the product with the unit matrix is what ml_dtypes says, in C++ and in XLA."""
    codes_V = np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF]).view(np.int8)
    w = Narrow(np.repeat(codes_V[None, :, None], 128, axis=2), np.ones((1, 254), np.float32), "e4m3", 128, "float32")
    for implementation in (cpp, "xla", "reference"):
        y_XF = product(jnp.eye(128), w, implementation=implementation)
        np.testing.assert_array_equal(y_XF, np.tile(codes_V.view(ml_dtypes.float8_e4m3fn).astype(np.float32), (128, 1)))


def test_blocks_are_those_of_the_release():
    """Quantised here or by research.convert, the same bytes and scales; ragged blocks too."""
    w_DF = np.random.default_rng(0).normal(size=(200, 130)).astype(np.float32)
    values_DF, scales_GB = blocks.quantize(w_DF)
    for w in (quantize(w_DF, "e4m3"), of_blocks(Blocks(values_DF, scales_GB))):
        np.testing.assert_array_equal(dequantize(w), blocks.dequantize(values_DF, scales_GB))
        assert w.nbytes == 256 * 130 + 4 * 2 * 130 and w.shape == (200, 130)


@pytest.mark.parametrize("format", FORMATS)
def test_in_xla_each_row_has_its_own_matrix_of_a_stack(format):
    w = drawn(70, 9, format, 128, 0, 3)
    x_XD, matrix_X = np.random.default_rng(0).normal(size=(4, 70)), np.array([2, 0, 2, 2], np.int32)
    expected = np.einsum("XD,XDF->XF", x_XD, written_out(w)[matrix_X])
    for implementation in ("xla", "reference"):
        y_XF = product(jnp.asarray(x_XD, jnp.float32), w, matrix_X, implementation)
        np.testing.assert_allclose(y_XF, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_cpps_product_in_scan_vmap_and_many_threads(cpp):
    """All threads that call at once have the whole result: none reads what another has not finished."""
    w = drawn(512, 512, "int4", 128, 0)  # large enough for several threads
    x_NXD = np.random.default_rng(0).normal(size=(4, 9, 512)).astype(np.float32)

    @jax.jit
    def steps(x_NXD):
        def step(x_NXD, _):
            y_NXD = jax.vmap(lambda x_XD: product(x_XD, w, implementation=cpp))(x_NXD)
            return y_NXD / jnp.max(jnp.abs(y_NXD)), None

        return jax.lax.scan(step, x_NXD, None, 20)[0]

    expected = x_NXD
    for _ in range(20):
        expected = expected @ np.asarray(dequantize(w))
        expected /= np.max(np.abs(expected))
    first = np.asarray(steps(x_NXD))
    np.testing.assert_allclose(first, expected, atol=1e-4)
    with ThreadPoolExecutor(8) as pool:
        for y_NXD in pool.map(lambda _: np.asarray(steps(x_NXD)), range(16)):
            np.testing.assert_array_equal(y_NXD, first)


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A home without a library, and a function that makes a shell script the only compiler there is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(choice, "_said", set())
    (tmp_path / "bin").mkdir()

    def become(script: str | None) -> None:
        made._register.cache_clear()
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        if script is not None:
            path = tmp_path / "bin/c++"
            path.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
            path.chmod(0o755)

    yield become
    made._register.cache_clear()


@pytest.mark.parametrize(("script", "said"), [
    (None, "none of c++, g++, clang++ is on PATH"),
    ("echo 'in file native.cc:\nnative.cc:1: error: broken\n1 more' >&2; exit 1", "native.cc:1: error: broken"),
    ("exit 3", "c++: code 3"),
    ("for last; do :; done; [ -e $last ] || echo no library >$last", "file too short"),
    ("printf 'error: \\351' >&2; exit 1", "c++: error: \ufffd"),
    ("for last; do :; done; [ -e $last ] || /usr/bin/cc -shared -x c /dev/null -o $last", "undefined symbol: Handler"),
])
def test_without_cpp_it_is_xlas_product_and_said_once(compiler, monkeypatch, script, said):
    compiler(script)
    lines = []
    monkeypatch.setattr(choice.logging, "warning", lambda form, *values: lines.append(form % values))
    w, x_XD = drawn(40, 3, "int8", 40, 0), np.ones((1, 40), np.float32)
    for _ in range(2):
        np.testing.assert_array_equal(product(x_XD, w), product(x_XD, w, implementation="xla"))
    assert len(lines) == 1 and lines[0].startswith("weight_only: plain XLA instead of C++") and said in lines[0]
    with pytest.raises(choice.Unavailable, match="implementation='native' cannot run"):
        product(x_XD, w, implementation="native")


COPY = """
for last; do :; done
case "$*" in *-dM*) echo '#define A'; exit;; esac
echo >>$HOME/compiled
echo 'half of' >$last; sleep 0.2; echo 'it' >>$last
"""


def test_the_library_is_made_once_by_whoever_comes_and_again_when_it_is_cut_off(compiler, tmp_path, monkeypatch):
    compiler(COPY)
    together = threading.Barrier(3)

    def make(_):
        together.wait()
        return made.compiled(native.SOURCE)

    with ThreadPoolExecutor(3) as pool:
        path, *others = pool.map(make, range(3))
    assert others == [path, path] and path.read_text() == "half of\nit\n"
    assert list(path.parent.iterdir()) == [path]
    before = (tmp_path / "compiled").read_text()
    assert made.compiled(native.SOURCE) == path and (tmp_path / "compiled").read_text() == before
    path.write_text("half of")
    assert made.compiled(native.SOURCE) == path and path.read_text() == "half of\nit\n"
    assert (tmp_path / "compiled").read_text() == before + "\n"
    compiler(COPY.replace("define A", "define B"))  # another processor, or compiler
    assert made.compiled(native.SOURCE) != path
    changed = tmp_path / "cpp.h"
    changed.write_text(made.HEADER.read_text() + "\n")
    other = made.compiled(native.SOURCE)
    monkeypatch.setattr(made, "HEADER", changed)
    assert made.compiled(native.SOURCE) != other
