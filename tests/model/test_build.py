"""The drawn weights are those that the modules' own initializers describe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import base
from research import config
from research.model.build import init_variables, make_model, variable_shapes
from research.tree import paths


def settings_of(**fields):
    c = base.select(base.get_config(), "smoke")
    c.model.vocab_size = 128
    c.update_from_flattened_dict(fields)
    return config.check(c)


@pytest.mark.parametrize("fields", [{}, {"model.attention": "gqa", "model.attention_bias": True},
                                    {"model.bias_form": "multiplicative", "mtp.num_nextn_predict_layers": 2}])
def test_each_array_is_of_the_kind_its_module_describes(fields):
    settings = settings_of(**fields)
    model = make_model(settings)
    tokens = jnp.ones((1, 4), jnp.int32)
    expected = paths(jax.jit(model.init)(jax.random.key(0), tokens, tokens, tokens))  # compiled, it draws and no more
    found = paths(init_variables(model, settings, seed=1))
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path].shape == leaf.shape and found[path].dtype == leaf.dtype
        if np.std(leaf) == 0:
            np.testing.assert_array_equal(found[path], leaf)
        else:
            assert np.std(found[path]) == pytest.approx(settings.model.initializer_range, rel=0.1)
            assert np.std(leaf) == pytest.approx(settings.model.initializer_range, rel=0.1)


def test_the_seed_and_the_path_alone_decide():
    deep, flat = (settings_of(**{"mtp.num_nextn_predict_layers": depth}) for depth in (2, 0))
    first, again, other, shallow = (paths(init_variables(make_model(s), s, seed)["params"])
                                    for s, seed in ((deep, 3), (deep, 3), (deep, 4), (flat, 3)))
    for path in first:
        np.testing.assert_array_equal(first[path], again[path])
        if path in shallow:
            np.testing.assert_array_equal(first[path], shallow[path])
    assert not np.array_equal(first["embed_tokens"], other["embed_tokens"])
    assert not np.array_equal(first["mtp_1/eh_proj/kernel"], first["mtp_2/eh_proj/kernel"])


def test_shapes_of_any_size_allocate_nothing():
    from experiments import deepseek_v3

    settings = config.check(deepseek_v3.get_config())
    shapes = variable_shapes(make_model(settings), settings)
    assert paths(shapes["params"])["layers/mlp/gate_proj"].shape == (58, 256, 7168, 2048)
