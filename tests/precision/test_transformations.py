"""Quantised products under jit, scan, checkpoint, vmap and shard_map."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.precision.experts import swiglu
from research.precision.matmul import linear
from research.precision.recipe import RECIPES

ROOT = Path(__file__).parents[2]
RECIPE = RECIPES["fp8_deepseek"]
X, D, L = 160, 144, 2


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / shape[-2] ** 0.5, jnp.bfloat16)


def assert_same_bits(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def layer(x_XD, weights):
    """A projection, and routed experts behind it."""
    w_DD, gate, up, down, weights_XK = weights
    indices_XK = jnp.stack([jnp.arange(X, dtype=jnp.int32) % 3, jnp.full(X, 3)], axis=1)
    h_XD = linear(x_XD, w_DD, {}, RECIPE, True, "auto")
    return x_XD + swiglu(h_XD, gate, up, down, indices_XK, weights_XK, {}, RECIPE, "auto")


def stacked_weights():
    shapes = ((L, D, D), (L, 4, D, 32), (L, 4, D, 32), (L, 4, 32, D), (L, X, 2))
    return [normal(*shape, seed=i).astype(jnp.float32) for i, shape in enumerate(shapes)]


def gradients_of(stack):
    """Of the sum of squares of what `stack` makes of x and the stacked weights, compiled."""
    return jax.jit(jax.value_and_grad(lambda x, weights: jnp.sum(jnp.square(stack(x, weights).astype(jnp.float32))),
                                      argnums=(0, 1)))


def scanned(body):
    return lambda x, weights: jax.lax.scan(lambda x, w: (body(x, w), None), x, weights)[0]


def looped(x, weights):
    for i in range(L):
        x = layer(x, [w[i] for w in weights])
    return x


def test_scan_and_checkpoint_change_no_bit_and_a_loop_but_roundings():
    """The loop is another program, whose float32 sums may run in another order: an 8-bit value or two moves to its
    neighbour. (In bfloat16 more do: XLA keeps float32 between operations that it fuses, other ones in each program.)
    """
    x, weights = normal(X, D, seed=9).astype(jnp.float32), stacked_weights()
    kept = gradients_of(scanned(layer))(x, weights)
    assert all(np.any(g) and np.all(np.isfinite(np.float32(g))) for g in jax.tree.leaves(kept))
    assert_same_bits(gradients_of(scanned(jax.checkpoint(layer)))(x, weights), kept)
    unrolled = gradients_of(looped)(x, weights)
    for a, b in zip(jax.tree.leaves(unrolled), jax.tree.leaves(kept), strict=True):
        assert np.linalg.norm(np.float64(a) - np.float64(b)) <= 5e-3 * np.linalg.norm(np.float64(b))


@pytest.mark.parametrize("recipe", ["fp8_deepseek", "fp8_tensor"])
def test_jit_changes_no_bit(recipe):
    """Scales and 8-bit values are exact operations, and a product in float32 is one call either way."""
    x, w, dy = normal(X, D), normal(D, D, seed=1).astype(jnp.float32), normal(X, D, seed=2)

    def run(x, w, dy):
        y, pull = jax.vjp(lambda x, w: linear(x, w, {}, RECIPES[recipe], False, "auto"), x, w)
        return y, pull(dy)

    assert_same_bits(jax.jit(run)(x, w, dy), run(x, w, dy))


@pytest.mark.parametrize("recipe", ["fp8_deepseek", "fp8_tensor", "mxfp8"])
def test_vmap_is_a_loop(recipe):
    """Over x and w together, and over x alone; each has its own tiles and, where a tensor has one, its own scale."""
    x = normal(3, X, D) * jnp.array([1, 64, 1e-6], jnp.bfloat16)[:, None, None]
    w, dy = normal(3, D, 48, seed=1).astype(jnp.float32), normal(3, X, 48, seed=2)

    def run(x, w, dy):
        y, pull = jax.vjp(lambda x, w: linear(x, w, {}, RECIPES[recipe], False, "auto"), x, w)
        return y, *pull(dy)

    one = jax.jit(run)
    for axes, of in (((0, 0, 0), lambda i: w[i]), ((0, None, 0), lambda _: w[0])):
        found = jax.jit(jax.vmap(run, in_axes=axes))(x, w if axes[1] == 0 else w[0], dy)
        for i in range(3):
            for a, b in zip(found, one(x[i], of(i), dy[i]), strict=True):
                np.testing.assert_allclose(np.float32(a[i]), np.float32(b), rtol=2.0**-7,
                                           atol=1e-6 * float(jnp.max(jnp.abs(b))))


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.sharding import AxisType, PartitionSpec as P
from research.precision.experts import swiglu
from research.precision.matmul import linear
from research.precision.recipe import RECIPES

assert jax.device_count() == 4
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
x, w, dy = normal(512, 160), normal(160, 144), normal(512, 144)
gate, up, down, dz = normal(160, 48), normal(160, 48), normal(48, 160), normal(512, 160)
recipe = RECIPES["fp8_deepseek"]

def step(x, w, gate, up, down, dy, dz, axis=None):
    def forward(x, w, gate, up, down):
        if axis:  # whose transpose is the sum of the devices' gradients
            w, gate, up, down = (jax.lax.pcast(m, axis, to="varying") for m in (w, gate, up, down))
        return (linear(x, w, {}, recipe, False, "auto"),
                swiglu(x, gate, up, down, None, None, {}, recipe, "auto"))
    out, pull = jax.vjp(forward, x, w, gate, up, down)
    return *out, *pull((dy, dz))

operands = x, w, gate, up, down, dy, dz
specs = P("data"), P(), P(), P(), P(), P("data"), P("data")
sharded = jax.jit(jax.shard_map(partial(step, axis="data"), mesh=mesh, in_specs=specs,
                                out_specs=(P("data"),) * 3 + (P(),) * 4))(*operands)
for name, a, b in zip(("y", "z", "dx", "dw", "dgate", "dup", "ddown"), sharded, jax.jit(step)(*operands), strict=True):
    error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
    assert a.shape == b.shape and error < (2e-6 if name in ("y", "dw") else 2e-3), (name, error)
print("same")
"""


def test_four_devices_are_one():
    """Rows over devices, weights on each, shards of whole tiles of 128 tokens: the weights' gradients add up in another
    order, and an 8-bit value of SwiGLU may move to its neighbour."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", SHARDED], cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=120)
    assert done.stdout == "same\n", done.stderr[-2000:]
