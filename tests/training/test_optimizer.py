"""AdamW by hand, the decay rules over every family, moments in bfloat16, Muon's directions."""

import functools
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import base
from research.accounting.parameters import shapes
from research.config import check
from research.training.optimizer import clip_by_global_norm, decay_mask, make_optimizer
from research.training.schedules import learning_rate
from research.tree import paths
from tests import tiny
from tests.model.test_transformer import FAMILIES
from tests.training import runs

SHAPES = {"embed_tokens": (6, 4), "norm": {"scale": (4,)}, "layers": {"mlp": {"gate_proj": (2, 3, 8, 4)},
          "attention": {"q_proj": {"kernel": (2, 4, 6), "bias": (2, 6)}}}}


def tree(seed, size=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: (size * rng.normal(size=shape)).astype(np.float32), SHAPES,
                        is_leaf=lambda x: isinstance(x, tuple))


def steps_of(s, gradients):
    """The updates of consecutive steps, and the last state."""
    optimizer = make_optimizer(s)
    params = tree(0)
    state, done = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        done.append(updates)
    return params, done, state


def test_adamw_by_hand():
    """Two steps in numpy: clip by the global norm, moments with bias correction, decoupled decay, the rate."""
    s = tiny.settings()
    gradients = [tree(1, size=3.0), tree(2, size=0.01)]  # the first is clipped, the second is not
    params, done, _ = steps_of(s, gradients)
    first, second = {}, {}
    for t, gradient in enumerate(gradients, start=1):
        norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in jax.tree.leaves(gradient)))
        assert (norm > 1) == (t == 1)
        rate = float(learning_rate(t, s.optimizer, 20))
        updates = paths(done[t - 1])
        for path, g in paths(gradient).items():
            g = g.astype(np.float64) * min(1, 1 / norm)
            first[path] = 0.9 * first.get(path, 0) + 0.1 * g
            second[path] = 0.95 * second.get(path, 0) + 0.05 * g * g
            direction = first[path] / (1 - 0.9 ** t) / (np.sqrt(second[path] / (1 - 0.95 ** t)) + 1e-8)
            decay = 0 if path.endswith(("scale", "bias")) else 0.1
            expected = -rate * (direction + decay * paths(params)[path])
            np.testing.assert_allclose(updates[path], expected, rtol=1e-4, atol=1e-7, err_msg=path)


@pytest.mark.parametrize("size", [0.0, 0.01, 3.0, 1e18, np.inf, np.nan])
def test_clipping_is_optax_s_to_the_last_bits(size):
    """The bits are the same where nothing is clipped, one division apart elsewhere; norms that are no number too."""
    gradient = jax.tree.map(lambda g: np.where(g > 0.5, np.float32(size), np.float32(min(size, 3) if size else 0)),
                            tree(1))
    expected, actual = (clip(1.0).update(gradient, optax.EmptyState())[0]
                        for clip in (optax.clip_by_global_norm, clip_by_global_norm))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0 if size < 1 else 4e-7, atol=0), actual, expected)


def test_the_rate_is_that_of_the_step_about_to_be_done():
    s = tiny.settings({"optimizer.warmup_fraction": 0.2, "optimizer.weight_decay": 0.0})  # 4 steps of warm-up
    gradient = tree(1)
    _, done, _ = steps_of(s, [gradient, gradient])
    for updates, rate in zip(done, (0.0025, 0.005), strict=True):  # the same gradient again: a direction of signs
        np.testing.assert_allclose(np.abs(updates["embed_tokens"]), rate, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_decay_rules_cover_every_parameter(name):
    """Matrices decay; norm gains and biases do not."""
    params = shapes(tiny.settings(FAMILIES[name]))
    mask = paths(decay_mask({path: leaf for path, leaf in params.items()}))
    assert mask.keys() == params.keys()
    for path, decays in mask.items():
        assert decays is not path.endswith(("/scale", "/bias")), path


EXPERIMENTS = sorted(path.stem for path in Path(base.__file__).parent.glob("[!_]*.py")
                     if path.stem not in runs.PIPELINES | {"base"})


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_decay_rules_cover_every_experiment(name):
    settings = check(importlib.import_module(f"experiments.{name}").get_config()).with_vocabulary(64)
    assert decay_mask(shapes(settings))


def test_a_parameter_that_no_rule_covers_is_an_error():
    with pytest.raises(ValueError, match="layers/attention/q_proj/quaternion"):
        decay_mask({"layers": {"attention": {"q_proj": {"quaternion": np.zeros(3)}}}})
    with pytest.raises(ValueError, match="e_score_correction_bias"):
        decay_mask({"gate": {"e_score_correction_bias": np.zeros(3)}})


def test_moments_in_bfloat16_stay_so_and_the_update_is_close():
    gradients = [tree(seed) for seed in range(1, 6)]
    _, exact, _ = steps_of(tiny.settings(), gradients)
    _, done, state = steps_of(tiny.settings({"optimizer.moment_dtype": "bfloat16"}), gradients)
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(tree(0))) and all(x.dtype == jnp.bfloat16 for x in moments)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(done[-1]))
    for path, update in paths(done[-1]).items():
        error = np.linalg.norm(update - paths(exact[-1])[path]) / np.linalg.norm(paths(exact[-1])[path])
        assert 0 < error < 0.02, path


@functools.cache
def muon():
    s = tiny.settings({"optimizer.name": "muon", "optimizer.weight_decay": 0.0})
    return s, steps_of(s, [tree(1)])


def test_muon_orthogonalises_each_matrix_of_a_stack_by_itself():
    """Singular values about 0.2 * sqrt(larger side) times the rate, with the gradient's singular vectors."""
    s, (_, done, _) = muon()
    rate = float(learning_rate(1, s.optimizer, 20))
    gradient = paths(tree(1))
    for path in ("layers/mlp/gate_proj", "layers/attention/q_proj/kernel"):
        update = np.asarray(paths(done[0])[path])
        for index in np.ndindex(*update.shape[:-2]):
            u, size, v = np.linalg.svd(gradient[path][index].astype(np.float64), full_matrices=False)
            values = -np.diag(u.T @ update[index] @ v.T) / (rate * 0.2 * max(update.shape[-2:]) ** 0.5)
            assert size.max() / size.min() > 1.4  # what is made equal
            assert values.min() > 0.6 and values.max() < 1.3, (path, index)
            rest = update[index] - u @ (u.T @ update[index] @ v.T) @ v
            assert np.linalg.norm(rest) < 1e-3 * np.linalg.norm(update[index])


def test_muon_leaves_embeddings_and_vectors_to_adamw():
    _, (_, done, _) = muon()
    _, adam, _ = steps_of(tiny.settings({"optimizer.weight_decay": 0.0}), [tree(1)])
    for path in ("embed_tokens", "norm/scale", "layers/attention/q_proj/bias"):
        np.testing.assert_allclose(paths(done[0])[path], paths(adam[0])[path], rtol=1e-5, err_msg=path)


def test_muon_keeps_its_moments_in_bfloat16():
    s = tiny.settings({"optimizer.name": "muon", "optimizer.moment_dtype": "bfloat16"})
    _, _, state = steps_of(s, [tree(1)])
    shapes = {x.shape for x in jax.tree.leaves(tree(1))}
    moments = [x for x in jax.tree.leaves(state) if x.shape in shapes]
    assert len(moments) == 2 + 2 * 3  # one of each by Muon, two of each by Adam
    assert {x.dtype for x in moments} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("name", ["v3", "v2", "qwen2"])
def test_muon_takes_every_family(name):
    """By shapes alone: one direction for every parameter."""
    s = tiny.settings(FAMILIES[name] | {"optimizer.name": "muon"})
    params = shapes(s)
    optimizer = make_optimizer(s)
    updates, _ = jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), params)
    assert {path: x.shape for path, x in updates.items()} == {path: x.shape for path, x in params.items()}
