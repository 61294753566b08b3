"""Grouped products: the definition against float64, expert by expert, every implementation against the definition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import choice
from kernels import grouped as kernel
from kernels.grouped import mosaic, reference, xla
from kernels.grouped.shapes import PRODUCT, WEIGHT_GRADIENT
from kernels.interpret import interpret_params, races_found
from kernels.operations import OPERATIONS
from kernels.product.tiles import Tiles
from tests.kernels.test_product import ROW, SHORT, SQUARE, assert_lowers, assert_near, covering, dequantized, quantized

E = 3
EXPERTS = {  # of each block
    "ragged": (0, 0, 0, 1, 2), "an expert without rows": (0, 0, 2, 2, 2), "rows of nobody": (0, 1, 2, -1, -1),
    "one expert has all": (1, 1, 1, 1, 1), "nobody has any": (-1, -1), "one block": (2,)}


def of_product(expert_N, columns=200, contraction=300, tile_a=ROW, tile_b=SQUARE, block=128):
    """Random in rows of nobody, too."""
    a = quantized((block * len(expert_N), contraction), tile_a)
    return *a, *quantized((E, columns, contraction), tile_b, seed=1), jnp.int32(expert_N)


def of_weight_gradient(expert_N, rows=130, columns=200, tile=ROW, block=128):
    a, b = (quantized((n, block * len(expert_N)), tile, seed=i) for i, n in enumerate((rows, columns)))
    return *a, *b, jnp.int32(expert_N), E


def exact_product(a, scales_a, tile_a, b, scales_b, tile_b, expert_N):
    """float64, and the sum of the terms' magnitudes."""
    a, block = dequantized(a, scales_a, tile_a), len(a) // len(expert_N)
    y, magnitudes = (np.zeros((a.shape[0], b.shape[1])) for _ in range(2))
    for n, e in enumerate(np.asarray(expert_N)):
        if e >= 0:
            mine, b_SC = slice(n * block, (n + 1) * block), dequantized(b[e], scales_b[e], tile_b)
            y[mine], magnitudes[mine] = a[mine] @ b_SC.T, np.abs(a[mine]) @ np.abs(b_SC).T
    return y, magnitudes


def exact_weight_gradient(a, scales_a, tile_a, b, scales_b, tile_b, expert_N, n_experts):
    a, b = dequantized(a, scales_a, tile_a), dequantized(b, scales_b, tile_b)
    of_M = np.repeat(np.asarray(expert_N), a.shape[1] // len(expert_N))
    dw, magnitudes = (np.stack([f(a[:, of_M == e]) @ f(b[:, of_M == e]).T for e in range(n_experts)])
                      for f in (np.asarray, np.abs))
    return dw, magnitudes


@partial(jax.jit, static_argnums=(0, 3, 6))
def product(module, a, scales_a, tile_a, b, scales_b, tile_b, expert_N):
    return module.product(a, scales_a, tile_a, b, scales_b, tile_b, expert_N)


@partial(jax.jit, static_argnums=(0, 3, 6, 8))
def weight_gradient(module, a, scales_a, tile_a, b, scales_b, tile_b, expert_N, n_experts):
    return module.weight_gradient(a, scales_a, tile_a, b, scales_b, tile_b, expert_N, n_experts)


def assert_both_agree(of_products, of_weights):
    for module in reference, xla:
        assert_near(product(module, *of_products), *exact_product(*of_products), of_products[0].shape[1])
        dw = np.asarray(weight_gradient(module, *of_weights))
        assert_near(dw, *exact_weight_gradient(*of_weights), of_weights[0].shape[1])
        for e in set(range(E)) - set(np.asarray(of_weights[-2]).tolist()):
            assert not dw[e].any()


@pytest.mark.parametrize("name", EXPERTS)
def test_the_definition_and_plain_xla_are_the_products(name):
    assert_both_agree(of_product(EXPERTS[name]), of_weight_gradient(EXPERTS[name]))


@pytest.mark.parametrize("tile, block", [(SHORT, 128), (SQUARE, 128), (None, 128), (ROW, 32), (SHORT, 32)])
def test_other_tiles_and_blocks(tile, block):
    expert_N = (2, 0, -1)
    assert_both_agree(of_product(expert_N, tile_a=tile, tile_b=tile, block=block),
                      of_weight_gradient(expert_N, tile=tile, block=block))


def test_under_jit_scan_and_remat():
    """Routings change from step to step, shapes do not."""
    expert_LN = jnp.int32([EXPERTS["ragged"], EXPERTS["rows of nobody"]])
    a, scales_a, _, b, scales_b, _, _ = of_product(EXPERTS["rows of nobody"])
    rows, rows_scales, _, columns, columns_scales, *_ = of_weight_gradient(EXPERTS["rows of nobody"])

    @jax.remat
    def run(expert_N):
        return (kernel.product(a, scales_a, ROW, b, scales_b, SQUARE, expert_N, out_dtype=jnp.bfloat16),
                kernel.weight_gradient(rows, rows_scales, ROW, columns, columns_scales, ROW, expert_N, E))

    y, dw = jax.jit(lambda: jax.lax.scan(lambda carry, expert_N: (carry, run(expert_N)), 0, expert_LN)[1])()
    assert y.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    for i, expert_N in enumerate(expert_LN):
        assert_near(y[i], *exact_product(a, scales_a, ROW, b, scales_b, SQUARE, expert_N), 300)
        of_weights = rows, rows_scales, ROW, columns, columns_scales, ROW, expert_N, E
        assert_near(dw[i], *exact_weight_gradient(*of_weights), 640)


def test_blocks_are_as_large_as_what_runs_takes():
    assert [kernel.block_rows(name) for name in ("auto", "xla", "reference", "mosaic")] == [32, 32, 128, 128]


def test_what_is_refused(monkeypatch):
    *operands, expert_N = of_product((0, 1))
    *of_weights, _, _ = of_weight_gradient((0, 1))
    for call, name in ((partial(kernel.product, *operands), "grouped product"),
                       (partial(kernel.weight_gradient, *of_weights, n_experts=E), "grouped weight gradient")):
        with pytest.raises(ValueError, match=f"{name}: 256 rows are not 3 blocks, as many as expert_N names"):
            call(expert_N=jnp.int32([0, 1, 2]))
        with pytest.raises(ValueError, match=f"{name}: implementation='mosaic' cannot run: .* not a GPU"):
            call(expert_N=expert_N, implementation="mosaic")
        with pytest.raises(ValueError, match=f"{name}: implementation='triton' is none of auto"):
            call(expert_N=expert_N, implementation="triton")
    with pytest.raises(ValueError, match=r"grouped product: scales of \(3, 200, 300\) .* expected \(3, 3, 2\)"):
        kernel.product(*operands[:4], operands[4][0], SQUARE, expert_N)
    with pytest.raises(ValueError, match=r"grouped weight gradient: scales of \(200, 256\) .* expected \(2, 200\)"):
        kernel.weight_gradient(*of_weights[:4], of_weights[4].T, ROW, expert_N, E)
    monkeypatch.setattr(choice, "gpu_refusal", lambda: None)
    with pytest.raises(ValueError, match=r"tiles of \(1, 32\): scales that change within 128"):
        kernel.product(*of_product((0, 1), tile_b=SHORT), implementation="mosaic")
    with pytest.raises(ValueError, match=r"tiles of \(1, 32\)"):
        kernel.weight_gradient(*of_weight_gradient((0, 1), tile=SHORT), implementation="mosaic")
    with pytest.raises(ValueError, match="blocks of 64 rows, not 128"):
        kernel.product(*operands, jnp.int32([0, 0, 1, 2]), implementation="mosaic")
    with pytest.raises(ValueError, match="blocks of 64 rows, not 128"):
        kernel.weight_gradient(*of_weights, jnp.int32([0, 0, 1, 2]), E, implementation="mosaic")
    for function in "product", "weight_gradient":
        monkeypatch.setattr(mosaic, function, lambda *arguments, **keywords: (arguments, keywords))
    assert kernel.product(*operands, expert_N, out_dtype=jnp.bfloat16) == ((*operands, expert_N),
                                                                           dict(out_dtype=jnp.bfloat16))
    assert kernel.weight_gradient(*of_weights, expert_N, E) == ((*of_weights, expert_N, E), {})


def interpreted(function, *operands, ordered=True, **keywords):
    """At four multiprocessors; with `ordered`, all accesses of the same memory are."""
    result = function(*operands, sms=4, interpret=interpret_params(ordered), **keywords)
    assert not (ordered and races_found(result))
    return np.asarray(result)


@pytest.mark.parametrize("name, columns, contraction, tile_b, tiles, out_dtype", [
    ("ragged", 256, 512, SQUARE, Tiles(stages=2), jnp.bfloat16),
    ("an expert without rows", 256, 384, SQUARE, Tiles(stages=2, cluster=2, turns=True), jnp.bfloat16),
    ("rows of nobody", 192, 384, SQUARE, Tiles(columns=192, stages=2, scales="shared"), jnp.float32),
    ("one expert has all", 160, 256, ROW, Tiles(columns=160, stages=2, scales="shared"), jnp.bfloat16),
    ("nobody has any", 128, 256, SQUARE, Tiles(stages=2, turns=True), jnp.bfloat16),
    ("one block", 200, 300, SQUARE, None, jnp.bfloat16),
    ("rows of nobody", 130, 200, None, None, jnp.float32)])
def test_product_kernel(name, columns, contraction, tile_b, tiles, out_dtype):
    operands = of_product(EXPERTS[name], columns, contraction, tile_b=tile_b)
    y = interpreted(mosaic.product, *operands, tiles=tiles, out_dtype=out_dtype)
    assert y.dtype == out_dtype
    assert_near(y, *exact_product(*operands), contraction)
    assert not y[np.repeat(np.asarray(EXPERTS[name]) < 0, 128)].any()


@pytest.mark.parametrize("name, rows, columns, tile, tiles", [
    ("ragged", 128, 256, ROW, Tiles(stages=2, turns=True)),
    ("an expert without rows", 128, 256, ROW, Tiles(stages=2, scales="shared", cluster=2)),
    ("rows of nobody", 256, 192, ROW, Tiles(columns=192, stages=2)),
    ("one expert has all", 128, 128, ROW, Tiles(stages=2, scales="shared", turns=True)),
    ("nobody has any", 128, 128, ROW, Tiles(stages=2)),
    ("one block", 130, 200, ROW, None),
    ("ragged", 100, 300, None, None)])
def test_weight_gradient_kernel(name, rows, columns, tile, tiles):
    operands = of_weight_gradient(EXPERTS[name], rows, columns, tile)
    dw = interpreted(mosaic.weight_gradient, *operands, tiles=tiles)
    assert dw.dtype == jnp.float32
    assert_near(dw, *exact_weight_gradient(*operands), 128 * len(EXPERTS[name]))
    for e in set(range(E)) - set(EXPERTS[name]):
        assert not dw[e].any()


def test_weight_gradient_kernel_repeats_entries_within_an_expert():
    operands = of_weight_gradient(EXPERTS["ragged"], 136, 160)
    assert_near(interpreted(mosaic.weight_gradient, *operands, ordered=False), *exact_weight_gradient(*operands), 640)


@pytest.mark.parametrize("name, shape", [("grouped_product", shape) for shape in PRODUCT]
                         + [("grouped_weight_gradient", shape) for shape in WEIGHT_GRADIENT])
def test_kernels_lower_for_hopper(name, shape):
    assert shape in OPERATIONS[name].shapes
    assert_lowers(name, shape, OPERATIONS[name].chosen(shape))


@pytest.mark.parametrize("name", ["grouped_product", "grouped_weight_gradient"])
def test_candidates_lower_for_hopper(name):
    shape = OPERATIONS[name].shapes[0]
    candidates = covering(OPERATIONS[name].candidates(shape))
    assert {tiles.cluster for tiles in candidates} == {1, 2} and {tiles.scales for tiles in candidates} > {"global"}
    for chosen in candidates:
        assert_lowers(name, shape, chosen)
