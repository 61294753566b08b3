"""The loss from a teacher's stored distributions: its own divergence, in pieces as in one, and none from itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from research.distillation import imitate
from research.distillation.logits import DIRECTIONS, divergence, keep_top
from tests import tiny

V = tiny.VOCABULARY


@pytest.fixture
def tables(monkeypatch):
    """(student's, teacher's) logits by the last token, and a batch; the balance loss is 0.25."""
    monkeypatch.setattr(imitate, "apply_model", lambda model, settings, params, routing, batch, amax=None: (
        params[batch["tokens_BT"]], tiny.balanced(0.25)))
    rng = np.random.default_rng(0)
    return *(jnp.asarray(rng.normal(size=(V, V)), jnp.float32) for _ in range(2)), tiny.batch()


def loss(params, batch, pieces=1, total=None, **config):
    total = batch["mask_BT"].sum() if total is None else total
    logits = FrozenConfigDict({"direction": "forward", "beta": 0.3, "temperature": 2.0} | config)
    return imitate.imitation_loss({"params": params, "amax": {}}, {}, batch, total, pieces, 0.0, None, None,
                                  logits=logits)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_with_all_tokens_kept_it_is_the_divergence(tables, direction):
    student, teacher, batch = tables
    batch |= keep_top(teacher[batch["tokens_BT"]], V, 2.0)
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(student, batch, direction=direction)

    def expected(student):
        return divergence(student[batch["tokens_BT"]], teacher[batch["tokens_BT"]], batch["mask_BT"],
                          direction=direction, beta=0.3, temperature=2.0)

    wanted, wanted_gradient = jax.value_and_grad(expected)(student)
    np.testing.assert_allclose(value, wanted + 0.25, rtol=1e-5)
    np.testing.assert_allclose(metrics["divergence"], wanted, rtol=1e-5)
    tiny.assert_close(gradient, wanted_gradient)
    halves = [loss(student, jax.tree.map(lambda x, i=i: x[2 * i:2 * i + 2], batch), 2, batch["mask_BT"].sum(),
                   direction=direction)[0] for i in (0, 1)]
    np.testing.assert_allclose(sum(halves), value, rtol=1e-5)


def test_the_teacher_itself_has_nothing_to_learn(tables):
    _, teacher, batch = tables
    batch |= keep_top(teacher[batch["tokens_BT"]], 4, 2.0)
    (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(teacher, batch)
    assert abs(metrics["divergence"]) < 1e-6 and float(jnp.abs(gradient).max()) < 1e-6
    assert metrics["next_token_loss"] > 1
