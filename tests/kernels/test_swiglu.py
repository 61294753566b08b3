"""SwiGLU fused with quantisation: the definition against gradients, every implementation against the definition."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import choice
from kernels import swiglu as kernel
from kernels.interpret import interpret_params, races_found
from kernels.quantize import reference as quantization
from kernels.quantize.stream import Tiles
from kernels.swiglu import mosaic, reference, xla
from kernels.swiglu.shapes import SHAPES

TILE = (1, 128)
EXACT = SimpleNamespace(  # quantisation that changes nothing
    quantize=lambda x, tile, power_of_two=False: (x, 1), dequantize=lambda values, scales, tile: values,
    quantize_both=lambda x: x, quantize_transposed=lambda x: x.T)


def inputs(R, F, dtype=jnp.bfloat16, seed=0):
    """g, u, da of many magnitudes and the weights of the rows."""
    rng = np.random.default_rng(seed)
    g, u, da = (rng.normal(size=(R, F)) * np.exp2(rng.normal(size=(R, F)) * 2) for _ in range(3))
    g[0], u[1], da[2] = 0, 0, 0
    return *(jnp.asarray(x, dtype) for x in (g, u, da * 1e-6)), jnp.asarray(rng.uniform(0, 1, R), jnp.float32)


@partial(jax.jit, static_argnums=2)
def kept_of(g_RF, u_RF, module=reference):
    return module.forward(g_RF, u_RF)[2:]


def assert_same(actual, expected):
    """Trees of equal arrays, bit for bit."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def assert_nearly_same(actual, expected):
    """Of gradients: multiply-adds that a compiler makes of the sums in them may change a last bit of a scale."""
    *actual, dweight = jax.tree.leaves(actual)
    *expected, expected_dweight = jax.tree.leaves(expected)
    np.testing.assert_allclose(dweight, expected_dweight, rtol=1e-4, atol=1e-5 * np.abs(expected_dweight).max())
    for a, b in zip(actual, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if a.dtype == jnp.float32:
            np.testing.assert_allclose(a, b, rtol=1e-6)
        else:
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            np.testing.assert_allclose(a, b, rtol=2.0**-3, atol=2.0**-9)  # the neighbour
            assert np.mean(a != b) < 1e-3


def test_backward_is_the_gradient():
    g, u, da, weight = inputs(6, 40, jnp.float32)

    def value(g, u, weight):
        return jnp.sum(jax.nn.silu(g) * u * weight[:, None] * da)

    dg, du, dweight = jax.grad(value, (0, 1, 2))(g, u, weight)
    actual = reference.backward(g, 1, u, 1, da, weight, q=EXACT)
    for a, b in zip(actual, (dg, du, (jax.nn.silu(g) * u * weight[:, None]).T, dweight), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())


def test_backward_of_quantised_input():
    """The gradient at the kept input, to the precision of E4M3; transposes from the gradient itself."""
    g, u, da, weight = inputs(130, 200)
    kept = kept_of(g, u)
    g_kept, u_kept = (quantization.dequantize(*pair, TILE) for pair in (kept[:2], kept[2:]))
    _, transpose = jax.vjp(lambda g, u: jax.nn.silu(g) * u, g_kept, u_kept)
    expected = transpose(da.astype(jnp.float32) * weight[:, None])
    dg, du, a_t, _ = jax.jit(reference.backward)(*kept, da, weight)
    for quantized, exact in zip((dg, du), expected, strict=True):
        for values, scales, x in ((*quantized[:2], exact), (*quantized[2:], exact.T)):
            step = np.repeat(scales, 128, axis=0)[:x.shape[1]].T * 2.0**-9  # of the smallest values
            error = np.abs(quantization.dequantize(values, scales, TILE) - x)
            assert (error <= np.maximum(np.abs(x) * 2.0**-4, step) * 1.001).all()
    a = jax.nn.silu(g_kept) * u_kept * weight[:, None]
    assert np.mean(np.abs(quantization.dequantize(*a_t, TILE) - a.T)) < 0.03 * np.mean(np.abs(a))


def test_forward_keeps_its_input_and_quantises_its_output():
    g, u, _, _ = inputs(130, 200)
    for power_of_two in (False, True):
        result = reference.forward(g, u, power_of_two)
        a = jax.nn.silu(g.astype(jnp.float32)) * u.astype(jnp.float32)
        assert_same(result, (*quantization.quantize(a, TILE, power_of_two=power_of_two),
                             *quantization.quantize(g, TILE), *quantization.quantize(u, TILE)))


def test_plain_xla_agrees():
    g, u, da, weight = inputs(130, 200)
    for power_of_two in (False, True):
        run = partial(jax.jit, static_argnums=2)
        assert_same(run(xla.forward)(g, u, power_of_two), run(reference.forward)(g, u, power_of_two))
    kept = kept_of(g, u)
    assert_nearly_same(jax.jit(xla.backward)(*kept, da, weight), jax.jit(reference.backward)(*kept, da, weight))


def test_under_jit_vmap_and_scan():
    g, u, da, weight = (jnp.stack([a, b]) for a, b in zip(inputs(20, 150), inputs(20, 150, seed=1), strict=True))

    def run(g, u, da, weight):
        a, a_scales, *kept = kernel.forward(g, u)
        return a, a_scales, kernel.backward(*kept, da, weight)

    one = jax.jit(run)
    expected = [one(*(x[i] for x in (g, u, da, weight))) for i in range(2)]
    expected = jax.tree.map(lambda *each: np.stack(each), *expected)
    assert_nearly_same(jax.jit(jax.vmap(run))(g, u, da, weight), expected)
    assert_nearly_same(jax.lax.scan(lambda carry, x: (carry, run(*x)), 0, (g, u, da, weight))[1], expected)


def test_what_the_kernels_do_not_take(monkeypatch):
    g, u, da, weight = inputs(4, 8)
    kept = kept_of(g, u)
    with pytest.raises(ValueError, match="not a GPU"):
        kernel.forward(g, u, implementation="mosaic")
    monkeypatch.setattr(choice, "gpu_refusal", lambda: None)
    for text, call in {
        "it reads float32, bfloat16, float16, not int8": partial(kernel.forward, g, u.astype(jnp.int8)),
        "it reads bfloat16, float16, not float32": partial(kernel.backward, *kept, da.astype(jnp.float32), weight),
        "has no entries": partial(kernel.forward, g[:0], u[:0]),
    }.items():
        with pytest.raises(ValueError, match=text):
            call(implementation="mosaic")
    monkeypatch.setattr(mosaic, "forward", lambda *arguments: ("forward", arguments))
    monkeypatch.setattr(mosaic, "backward", lambda *arguments: ("backward", arguments))
    assert kernel.forward(g, u, True) == ("forward", (g, u, True))
    assert kernel.backward(*kept, da, weight) == ("backward", (*kept, da, weight))


@pytest.mark.parametrize("shape, tiles, dtype", [
    ((128, 384), Tiles(steps=3, stages=2, places=2), jnp.bfloat16), ((130, 200), None, jnp.float32)])
def test_forward_kernel(shape, tiles, dtype):
    g, u, _, _ = inputs(*shape, dtype)
    for power_of_two in (False, True):
        actual = mosaic.forward(g, u, power_of_two, tiles=tiles, interpret=interpret_params(detect_races=True))
        assert not races_found(actual)
        assert_same(actual, jax.jit(reference.forward, static_argnums=2)(g, u, power_of_two))


@pytest.mark.parametrize("shape, tiles, dtype", [
    ((256, 256), mosaic.BackwardTiles(steps=2), jnp.bfloat16), ((130, 200), None, jnp.float16)])
def test_backward_kernel(shape, tiles, dtype):
    g, u, da, weight = inputs(*shape, dtype)
    kept = kept_of(g, u)
    actual = mosaic.backward(*kept, da, weight, tiles=tiles, interpret=interpret_params(detect_races=True))
    assert not races_found(actual)
    assert_nearly_same(actual, jax.jit(reference.backward)(*kept, da, weight))


def lower(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_lower_for_hopper(shape):
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    assert "mosaic_gpu" in lower(mosaic.forward, x, x)
    kept = jax.eval_shape(kept_of, x, x)
    weight = jax.ShapeDtypeStruct(shape[:1], jnp.float32)
    assert "mosaic_gpu" in lower(mosaic.backward, *kept, x, weight)


def test_candidates_fit_into_shared_memory():
    assert mosaic.chosen_for_forward(SHAPES[0]) in mosaic.FORWARD_CANDIDATES
    assert mosaic.chosen_for_backward(SHAPES[0]) in mosaic.BACKWARD_CANDIDATES
    x = jax.ShapeDtypeStruct((128, 2048), jnp.bfloat16)
    largest = max(mosaic.FORWARD_CANDIDATES, key=lambda tiles: (tiles.rows, tiles.stages, tiles.places))
    assert "mosaic_gpu" in lower(partial(mosaic.forward, tiles=largest), x, x)


def test_unknown_tiles_are_refused():
    with pytest.raises(ValueError, match="BackwardTiles.steps=0"):
        mosaic.BackwardTiles(0)
