"""Products of quantised operands: the definition against float64, every implementation against the definition."""

from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import choice, tuned
from kernels import product as kernel
from kernels.interpret import interpret_params, races_found
from kernels.operations import OPERATIONS
from kernels.product import mosaic, reference, xla
from kernels.product.operands import check_scales, refusal, scales_of_columns, scales_of_rows
from kernels.product.shapes import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from kernels.product.tiles import SCALES, Layout, Tiles, default, multiprocessors
from kernels.quantize import reference as quantization

ROW, SQUARE, SHORT = (1, 128), (128, 128), (1, 32)


def quantized(shape, tile, kind="e4m3", seed=0, octaves=2.0):
    """(values, scales, tile) of many magnitudes: rows of zeros, huge and tiny ones, and a tile of zeros. None: one."""
    rng = np.random.default_rng([seed, *shape])
    x = rng.normal(size=shape) * np.exp2(rng.normal(size=shape) * octaves)
    if shape[-2] > 3:
        x[..., 0, :], x[..., 1, :], x[..., 2, :] = 0, x[..., 1, :] * 1e15, x[..., 2, :] * 1e-15
    x[..., :128, -128:] = 0 if shape[-1] > 128 else x[..., :128, -128:]
    tile = tile or shape[-2:]
    quantize = jax.jit(partial(quantization.quantize, tile=tile, kind=kind))
    return *(jax.vmap(quantize) if x.ndim == 3 else quantize)(jnp.asarray(x, jnp.float32)), tile


def dequantized(values, scales, tile):
    """float64, entry by entry: the scale of (i, j) stands at (j // c, i // r)."""
    i, j = np.indices(values.shape)
    return np.asarray(values, np.float64) * np.asarray(scales, np.float64)[j // tile[1], i // tile[0]]


def exact(a, b):
    """a b^T in float64, and the sum of the magnitudes of its terms, by which rounding is measured."""
    a, b = dequantized(*a), dequantized(*b)
    return a @ b.T, np.abs(a) @ np.abs(b).T


def assert_near(actual, expected, magnitudes, terms):
    """Float32 sums of so many terms, each rounded a few times; then, for bfloat16, half of its last bit."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    error, last = np.abs(actual.astype(np.float64) - expected), 2.0**-8 * (actual.dtype == jnp.bfloat16)
    assert (error <= (terms + 8) * 2.0**-24 * magnitudes + last * np.abs(expected)).all(), np.nanmax(error / magnitudes)


PAIRS = {
    "forward": (ROW, SQUARE, "e4m3", "e4m3"), "weight gradient": (ROW, ROW, "e4m3", "e4m3"),
    "blocks": (SQUARE, SQUARE, "e4m3", "e5m2"), "1x32": (SHORT, SHORT, "e4m3", "e4m3"),
    "tensors": (None, None, "e4m3", "e5m2"), "one tensor": (None, ROW, "e5m2", "e4m3"),
    "wide": (ROW, (1, 256), "e5m6", "e4m3")}


@pytest.mark.parametrize("shape", [(130, 200, 300), (5, 40, 70), (1, 1, 384)])
@pytest.mark.parametrize("name", PAIRS)
def test_the_definition_and_plain_xla_are_the_product(name, shape):
    (R, S, C), (tile_a, tile_b, *kinds) = shape, PAIRS[name]
    a, b = quantized((R, C), tile_a, kinds[0]), quantized((S, C), tile_b, kinds[1], seed=1)
    for module in reference, xla:
        y = jax.jit(partial(module.product, tile_a=a[2], tile_b=b[2]))(*a[:2], b_SC=b[0], scales_b=b[1])
        assert y.dtype == jnp.float32
        assert_near(y, *exact(a, b), C)


def test_by_hand():
    """Two chunks of 128, whose scales are 2 and 3 for the row, 5 and 7 for the block."""
    a, b = jnp.ones((1, 256)), jnp.ones((2, 256)).at[1].set(-2)
    scales_a, scales_b = jnp.float32([[2], [3]]), jnp.float32([[5], [7]])
    for name in "reference", "xla", "auto":
        y = kernel.product(a.astype(jnp.float8_e4m3fn), scales_a, ROW, b.astype(jnp.float8_e4m3fn), scales_b, SQUARE,
                           implementation=name)
        np.testing.assert_array_equal(y, [[128 * (10 + 21), -256 * (10 + 21)]])


def test_under_jit_scan_and_remat():
    a, b = quantized((3, 20, 150), ROW), quantized((30, 150), SQUARE)

    def run(values, scales):
        return kernel.product(values, scales, ROW, *b, out_dtype=jnp.bfloat16)

    expected = np.stack([jax.jit(run)(*pair) for pair in zip(*a[:2], strict=True)])
    assert expected.dtype == jnp.bfloat16 and expected.any()
    for function in run, jax.remat(run):
        np.testing.assert_array_equal(jax.lax.scan(lambda _, pair: (0, function(*pair)), 0, a[:2])[1], expected)  # noqa: B023


def test_what_is_refused(monkeypatch):
    a, b = quantized((8, 256), ROW), quantized((8, 256), SQUARE)
    with pytest.raises(ValueError, match=r"product: scales of \(8, 256\) in tiles of \(1, 128\) have shape \(8, 2\), "
                                         r"expected \(2, 8\): contraction first"):
        kernel.product(a[0], a[1].T, ROW, *b)
    with pytest.raises(ValueError, match=r"in tiles of \(128, 128\) have shape \(2, 8\), expected \(2, 1\)"):
        kernel.product(*a, b[0], a[1], SQUARE)
    with pytest.raises(ValueError, match=r"expected \(3, 2, 1\)"):
        check_scales("product", jnp.ones((3, 8, 256)), jnp.ones((2, 1)), SQUARE)
    with pytest.raises(ValueError, match="implementation='mosaic' cannot run: the default device is a cpu, not a GPU"):
        kernel.product(*a, *b, implementation="mosaic")
    with pytest.raises(ValueError, match="implementation='triton' is none of auto, mosaic, xla, reference"):
        kernel.product(*a, *b, implementation="triton")
    monkeypatch.setattr(choice, "gpu_refusal", lambda: None)
    for text, operands in {
        "values of float16: the tensor cores multiply E4M3 and E5M2": (*quantized((8, 256), ROW, "e5m6"), *b),
        r"tiles of \(1, 32\): scales that change within 128": (*a, *quantized((8, 256), SHORT)),
        r"tiles of \(1, 192\)": (*a, *quantized((8, 256), (1, 192))),
    }.items():
        with pytest.raises(ValueError, match=text):
            kernel.product(*operands, implementation="mosaic")
    with pytest.raises(ValueError, match="out_dtype=float16: expected float32 or bfloat16"):
        kernel.product(*a, *b, out_dtype=jnp.float16, implementation="mosaic")
    assert refusal(jnp.bfloat16, (a[0], ROW), (b[0], (8, 256)), (a[0][:, :32], SHORT)) is None
    monkeypatch.setattr(mosaic, "product", lambda *operands, **keywords: (operands, keywords))
    assert kernel.product(*a, *b, out_dtype=jnp.bfloat16) == ((*a, *b), dict(out_dtype=jnp.bfloat16))


@pytest.mark.parametrize("tile", [ROW, SQUARE, (64, 128), (256, 128), (1, 300), (300, 300), (3, 256)])
def test_scales_in_the_form_of_the_kernels(tile):
    values, scales, tile = quantized((300, 300), tile)
    expected = quantization.spread(scales, tile, values.shape)
    np.testing.assert_array_equal(
        quantization.spread(scales_of_rows(scales, tile, 300, 300), ROW, values.shape), expected)
    of_columns = scales_of_columns(scales, tile, 300, 300)
    blocks = tile[0] in (128, 256, 300)
    assert of_columns.shape == (3, 3 if blocks else 300)
    np.testing.assert_array_equal(quantization.spread(of_columns, SQUARE if blocks else ROW, values.shape), expected)


def assert_the_kernel_agrees(shape, tile_b, chosen, out_dtype, tile_a=ROW, kinds=("e4m3", "e4m3"), ordered=True,
                             **keywords):
    """At four multiprocessors; with `ordered`, all accesses of the same memory are."""
    R, S, C = shape
    a, b = quantized((R, C), tile_a, kinds[0]), quantized((S, C), tile_b, kinds[1], seed=1)
    y = mosaic.product(*a, *b, out_dtype=out_dtype, tiles=chosen, sms=4, interpret=interpret_params(ordered),
                       **keywords)
    assert not (ordered and races_found(y))
    assert y.dtype == out_dtype
    assert_near(y, *exact(a, b), C)


@pytest.mark.parametrize("chosen, columns, tile_b, out_dtype", [
    (Tiles(stages=2), 384, SQUARE, jnp.bfloat16),
    (Tiles(stages=2, band=1, turns=True), 256, ROW, jnp.float32),
    (Tiles(stages=2, scales="shared"), 256, ROW, jnp.float32),
    (Tiles(stages=2, scales="shared", cluster=2, turns=True), 256, SQUARE, jnp.bfloat16),
    (Tiles(columns=160, stages=2, turns=True), 320, SQUARE, jnp.bfloat16),
    (Tiles(columns=192, stages=3, cluster=2), 384, SQUARE, jnp.float32),
    (Tiles(columns=192, stages=2, scales="shared"), 192, ROW, jnp.bfloat16),
])
def test_kernel(chosen, columns, tile_b, out_dtype):
    assert_the_kernel_agrees((256, columns, 128 * 5), tile_b, chosen, out_dtype)


def test_scales_that_no_fence_orders_are_a_race(capfd):
    """What the tiles' docstring says of `unfenced`; and that races are seen at all."""
    chosen, shape = Tiles(stages=2, scales="unfenced"), (256, 128, 128 * 8)
    assert_the_kernel_agrees(shape, ROW, chosen, jnp.float32, ordered=False)
    with pytest.raises(AssertionError):
        assert_the_kernel_agrees(shape, ROW, chosen, jnp.float32)
    assert "RACE DETECTED" in capfd.readouterr().out


@pytest.mark.parametrize("shape, tile_a, tile_b, kinds", [
    ((130, 200, 300), ROW, SQUARE, ("e4m3", "e5m2")),
    ((130, 200, 300), ROW, ROW, ("e5m2", "e4m3")),
    ((5, 40, 70), SQUARE, None, ("e4m3", "e4m3")),
    ((128, 128, 128), None, (64, 128), ("e5m2", "e5m2"))])
def test_kernel_of_padded_operands_with_the_default_tiles(shape, tile_a, tile_b, kinds):
    assert_the_kernel_agrees(shape, tile_b, None, jnp.bfloat16, tile_a, kinds)


@pytest.mark.parametrize("tile_b", [ROW, SQUARE])
def test_last_tiles_repeat_entries_of_those_before(tile_b):
    """Unordered, but of the same values: 8 and 32 are all that rows and columns need be multiples of."""
    assert_the_kernel_agrees((136, 160, 256), tile_b, Tiles(), jnp.bfloat16, ordered=False)


def test_kernel_without_promotion():
    """Only the tensor cores show what it costs: here it is right."""
    assert_the_kernel_agrees((128, 256, 768), None, Tiles(stages=2), jnp.bfloat16, None, promote=False)


def lower(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def assert_lowers(name, shape, chosen):
    """For Hopper, without one: shapes, layouts and shared memory are checked."""
    operation = OPERATIONS[name]
    arguments = jax.eval_shape(partial(operation.arguments, shape), jax.random.key(0))
    assert "mosaic_gpu" in lower(operation.mosaic(shape, chosen), *arguments)


def covering(candidates):
    """Those of the tiles that have a value of some field which none before has."""
    seen, kept = set(), []
    for tiles in candidates:
        values = set(asdict(tiles).items())
        kept += [tiles] if values - seen else []
        seen |= values
    return kept


@pytest.mark.parametrize("name, shape", [(name, shape) for name in ("product", "weight_gradient")
                                         for shape in OPERATIONS[name].shapes])
def test_kernel_lowers_for_hopper(name, shape):
    assert_lowers(name, shape, OPERATIONS[name].chosen(shape))


def test_every_real_shape_lowers():
    lowered = OPERATIONS["product"].shapes + OPERATIONS["weight_gradient"].shapes
    assert set(lowered) >= {*FORWARD, *INPUT_GRADIENT, *WEIGHT_GRADIENT} and len(FORWARD) == 7


@pytest.mark.parametrize("name", ["product", "weight_gradient"])
def test_candidates_lower_for_hopper(name):
    """All values of each field; a search compiles all of the product's 43."""
    shape = FORWARD[2]
    candidates = covering(OPERATIONS[name].candidates(shape))
    assert {tiles.scales for tiles in candidates} == set(SCALES) and {tiles.cluster for tiles in candidates} == {1, 2}
    for chosen in candidates:
        assert_lowers(name, shape, chosen)


@pytest.mark.parametrize("tile_b", [ROW, SQUARE])
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
def test_sizes_that_are_not_padded_lower(tile_b, out_dtype):
    """A copy of 64 columns that starts at the 32nd would not: columns are stored by as many as always divide."""
    a, b = (jax.ShapeDtypeStruct((rows, 256), jnp.float8_e5m2) for rows in (136, 160))
    scales_a = jax.ShapeDtypeStruct((2, 136), jnp.float32)
    scales_b = jax.ShapeDtypeStruct((2, -(-160 // tile_b[0])), jnp.float32)

    def run(a, scales_a, b, scales_b):
        return mosaic.product(a, scales_a, ROW, b, scales_b, tile_b, out_dtype=out_dtype)

    assert "mosaic_gpu" in lower(run, a, scales_a, b, scales_b)


def test_layouts():
    assert Layout.of(Tiles(), 4096, True, jnp.bfloat16) == Layout(part=128, slice=64, stages=5)
    assert Layout.of(Tiles(columns=160), 320, True, jnp.bfloat16) == Layout(part=32, slice=32, stages=5)
    assert Layout.of(Tiles(columns=192, stages=9), 7168, True, jnp.float32) == Layout(part=64, slice=32, stages=4)
    assert Layout.of(Tiles(), 160, False, jnp.bfloat16).slice == 32
    assert Layout.of(Tiles(stages=7), 4096, False, jnp.float32).stages == 6
    assert Layout.of(Tiles(stages=7, scales="shared"), 4096, False, jnp.float32).stages == 5


def test_default_tiles_are_wide_where_that_takes_fewer_rounds():
    assert default(4096, 2112, by_block=True).columns == 192  # 32 x 11 in 3 rounds of 132, not 32 x 17 in 5
    usual = Tiles(stages=6, scales="shared")
    assert default(4096, 2112, by_block=False) == default(4096, 512, by_block=True) == usual  # one round of either
    assert default(4096, 7168, by_block=True) == usual  # 14 rounds of 128, 10 of 192: as long, by the guess
    assert default(4096, 130, by_block=True) == usual


def test_tiles_are_those_of_the_gpu_that_is_meant():
    """Not of the machine that lowers; a mesh of other devices than GPUs says nothing of multiprocessors."""
    here = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 PCIe", core_count=114)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: [here])
        assert (multiprocessors(), tuned.device_kind()) == (114, "NVIDIA H100 PCIe")
        with choice.meant_for_h200():
            assert (multiprocessors(), tuned.device_kind()) == (132, "NVIDIA H200")
        of_cpus = jax.sharding.AbstractDevice(device_kind="cpu", platform="cpu", num_cores=None)
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("data",), abstract_device=of_cpus)):
            assert multiprocessors() == 114
    assert (multiprocessors(), tuned.device_kind()) == (132, "NVIDIA H200")


def test_unknown_tiles_are_refused():
    for fields in (dict(columns=120), dict(columns=288), dict(stages=1), dict(cluster=3), dict(band=0),
                   dict(scales="fenced")):
        with pytest.raises(ValueError, match=f"Tiles.{next(iter(fields))}="):
            Tiles(**fields)
    for sizes in ((64, 256), (128, 96), (128, 384)):
        with pytest.raises(ValueError, match="does not fit"):
            Tiles(cluster=2).counts(*sizes)
    assert Tiles(cluster=2).counts(130, 400) == (2, 4)
