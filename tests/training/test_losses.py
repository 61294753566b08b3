"""Cross-entropy against optax, and what counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.training.losses import cross_entropy, token_losses
from tests import tiny

B, T, V = 3, 5, 11


def inputs(scale=1.0):
    rng = np.random.default_rng(0)
    logits_BTV = (scale * rng.normal(size=(B, T, V))).astype(np.float32)
    return logits_BTV, rng.integers(0, V, (B, T)).astype(np.int32), rng.normal(size=(B, T)).astype(np.float32)


def test_cross_entropy_equals_optax_in_value_and_gradient():
    logits_BTV, targets_BT, weight_BT = inputs()

    def total(function):
        return jax.jit(jax.value_and_grad(lambda logits: jnp.sum(weight_BT * function(logits, targets_BT))))(logits_BTV)

    tiny.assert_close(cross_entropy(logits_BTV, targets_BT),
                      optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT))
    tiny.assert_close(total(cross_entropy), total(optax.softmax_cross_entropy_with_integer_labels))


def test_logits_of_thousands_do_not_overflow():
    logits_BTV, targets_BT, _ = inputs(scale=3000.0)
    value, gradient = jax.value_and_grad(lambda logits: jnp.sum(cross_entropy(logits, targets_BT)))(logits_BTV)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_a_uniform_guess_costs_the_logarithm_of_the_vocabulary():
    targets_BT = inputs()[1]
    np.testing.assert_allclose(cross_entropy(np.zeros((B, T, V), np.float32), targets_BT), np.log(V), rtol=1e-6)


def test_masked_targets_count_neither_in_value_nor_in_gradient():
    batch = tiny.batch()
    logits_BTV = np.random.default_rng(0).normal(size=(*batch["mask_BT"].shape, tiny.VOCABULARY)).astype(np.float32)
    elsewhere = {**batch, "targets_BT": np.where(batch["mask_BT"], batch["targets_BT"], 5)}
    loss = jax.value_and_grad(lambda logits, b: token_losses((logits,), b)[0])
    value, gradient = loss(logits_BTV, batch)
    assert float(value) == float(loss(logits_BTV, elsewhere)[0])
    assert np.max(np.abs(np.asarray(gradient)[~batch["mask_BT"]])) == 0
    assert np.min(np.max(np.abs(np.asarray(gradient)[batch["mask_BT"]]), axis=-1)) > 0
    nothing = {**batch, "mask_BT": np.zeros_like(batch["mask_BT"])}
    assert float(token_losses((logits_BTV, logits_BTV), nothing)[1][0]) == 0
