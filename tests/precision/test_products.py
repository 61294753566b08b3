"""Which products of a model a recipe quantises, which never, and what the config says of it."""

import functools
import re
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import base
from research import config, experiment
from research.errors import RequestError
from research.model.build import make_model, variable_shapes
from research.precision import products
from research.precision.later import is_later
from research.precision.matmul import matmul
from research.precision.products import FEED_FORWARD, Products
from research.precision.recipe import RECIPES
from research.training.step import apply_model
from research.tree import paths
from tests import tiny

QUANTISED = [name for name, recipe in RECIPES.items() if recipe.quantized]
BFLOAT16, DEEPSEEK = Products(RECIPES["bfloat16"]), Products(RECIPES["fp8_deepseek"])
X, D, F, E, K = 20, 144, 160, 4, 2


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def pulled(function, *operands):
    """Value and gradients, compiled."""
    def run(*operands):
        y, pull = jax.vjp(function, *operands)
        return y, *pull(jnp.cos(y))

    return jax.jit(run)(*operands)


def assert_same_bits(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def differ(actual, expected) -> bool:
    return any(np.any(np.asarray(a) != np.asarray(b))
               for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))


class TestWaiting:
    """Weights whose gradients are multiplied in a second pass."""

    @pytest.mark.parametrize("products, name", [(BFLOAT16, "o_proj"), (DEEPSEEK, "o_proj"), (DEEPSEEK, "q_proj")])
    def test_two_passes_find_what_one_does(self, products, name):
        """Of two layers; of the projection after attention the recipe keeps the input otherwise."""
        path, x, w_LDF = f"layers/{name}/kernel", normal(2, 10, D).astype(jnp.bfloat16), normal(2, D, F, seed=1)

        def layers(x, w_LDF):
            return [products.linear(x, jax.tree.map(itemgetter(layer), w_LDF), name, {}) for layer in range(2)]

        def one_pass(x, w_LDF):
            y, pull = jax.vjp(layers, x, w_LDF)
            return y, *pull([jnp.cos(y) for y in y])

        def two_passes(x, w_LDF):
            waiting = products.with_later({"layers": {name: {"kernel": w_LDF}}}, 2, 10)["layers"][name]["kernel"]
            y, pull = jax.vjp(layers, x, waiting)
            dx, found = pull([jnp.cos(y) for y in y])
            kept = [jnp.stack([jnp.full_like(z, jnp.nan), z]) for z in (found.x, found.dy)]  # of two passes
            return y, dx, products.weight_gradient(path, w_LDF, kept, 1)

        assert_same_bits(jax.jit(two_passes)(x, w_LDF), jax.jit(one_pass)(x, w_LDF))

    def test_nothing_is_multiplied_twice(self):
        """Of a feed-forward network: three products, three of gradients of inputs, and in the second pass three."""
        products = Products(RECIPES["fp8_deepseek"], ("up_proj",))  # of which none is in 8 bits
        params = {"mlp": {name: {"kernel": normal(*((F, D) if name == "down_proj" else (D, F)))}
                          for name in FEED_FORWARD}}

        def network(x, params):
            return products.feed_forward(x, *(params["mlp"][name]["kernel"] for name in FEED_FORWARD), {})

        def first(x, params):
            y, pull = jax.vjp(network, x, products.with_later(params, 2, 10))
            dx, found = pull(jnp.cos(y))
            return y, dx, {path: (z.x[None], z.dy[None]) for path, z in paths(found, is_later).items()}

        def second(params, operands):
            return {path: products.weight_gradient(path, w_DF, operands[path], 0)
                    for path, w_DF in paths(params).items()}

        x = normal(2, 10, D).astype(jnp.bfloat16)
        compiled = jax.jit(first).lower(x, params).compile()
        y, dx, operands = compiled(x, params)
        last = jax.jit(second).lower(params, operands).compile()
        assert [program.as_text().count(" dot(") for program in (compiled, last)] == [6, 3]
        expected = pulled(network, x, params)
        assert_same_bits((y, dx, last(params, operands)), (*expected[:2], paths(expected[2])))

    def test_what_can_wait(self):
        """All projections; in 8 bits no feed-forward network's. Never embedding, head, norms, gate, routed experts."""
        s = tiny.settings()
        shapes = variable_shapes(make_model(s), s)["params"]
        waits = {products: {path.split("/")[-2] for path in paths(shapes) if products.puts_off(path)}
                 for products in (BFLOAT16, DEEPSEEK)}
        attention = {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "eh_proj"}
        assert waits == {BFLOAT16: attention | {*FEED_FORWARD}, DEEPSEEK: attention}


class TestHighPrecision:
    def test_a_projection_left_out_is_that_of_bfloat16(self):
        x, w = normal(2, 10, D).astype(jnp.bfloat16), normal(D, F, seed=1)

        def projection(products, name):
            return pulled(lambda x, w: products.linear(x, w, name, {}), x, w)

        expected = projection(BFLOAT16, "q_proj")
        left_out = Products(RECIPES["fp8_deepseek"], ("q_proj",))
        assert_same_bits(projection(left_out, "q_proj"), expected)
        assert_same_bits(projection(DEEPSEEK, "eh_proj"), expected)  # the recipe's own
        assert differ(projection(DEEPSEEK, "q_proj"), expected)
        assert differ(projection(left_out, "kv_b_proj"), expected)

    @pytest.mark.parametrize("name", FEED_FORWARD)
    def test_a_feed_forward_network_goes_as_a_whole(self, name):
        x, gate, up = normal(2, 10, D).astype(jnp.bfloat16), normal(D, F, seed=1), normal(D, F, seed=2)
        operands = x, gate, up, normal(F, D, seed=3)

        def network(products):
            return pulled(lambda *o: products.feed_forward(*o, {}), *operands)

        expected = network(BFLOAT16)
        assert_same_bits(network(Products(RECIPES["fp8_deepseek"], (name,))), expected)
        if name == "gate_proj":
            assert differ(network(DEEPSEEK), expected)
            assert differ(network(Products(RECIPES["fp8_deepseek"], ("o_proj",))), expected)

    def test_so_do_routed_experts(self):
        x, gate, up = normal(X, D).astype(jnp.bfloat16), normal(E, D, F, seed=1), normal(E, D, F, seed=2)
        down, weights_XK = normal(E, F, D, seed=3), jnp.abs(normal(X, K, seed=4))
        indices_XK = jnp.stack([jnp.arange(X) % 2, 2 + jnp.arange(X) % 2], axis=1).astype(jnp.int32)

        def of(products):
            return pulled(lambda x, gate, up, down, weights: products.experts(
                x, gate, up, down, indices_XK, weights, {}), x, gate, up, down, weights_XK)

        assert_same_bits(of(Products(RECIPES["fp8_deepseek"], ("up_proj",))), of(BFLOAT16))

    def test_the_three_products_of_an_unquantised_projection_are_in_bfloat16(self):
        x, w = normal(X, D).astype(jnp.bfloat16), normal(D, F, seed=1)
        expected = pulled(lambda x, w: matmul(x, w, 3 * ("bfloat16",)).astype(jnp.bfloat16), x, w)
        assert_same_bits(pulled(lambda x, w: DEEPSEEK.linear(x, w, "eh_proj", {}), x, w), expected)

    def test_history_and_dtype_follow_the_recipe(self):
        assert {name: Products(recipe).history for name, recipe in RECIPES.items() if Products(recipe).history} == {
            "fp8_delayed": 16}
        assert {Products(RECIPES[name]).dtype for name in QUANTISED} == {jnp.dtype("bfloat16")}
        assert Products(RECIPES["float32"]).dtype == jnp.float32 and BFLOAT16.dtype == jnp.bfloat16

    def test_an_implementation_that_cannot_run_is_refused(self):
        x, w = normal(X, D), normal(D, F)
        with pytest.raises(ValueError, match="'mosaic' cannot run: the default device is a cpu"):
            Products(RECIPES["fp8_deepseek"], implementation="mosaic").linear(x, w, "q_proj", {})


SMALL = {"precision.recipe": "fp8_deepseek", "mtp.num_nextn_predict_layers": 1, "model.num_hidden_layers": 2,
         "model.q_lora_rank": 8, "model.head_dim": 10}
ATTENTION = {"mla": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
             "gqa": {"q_proj", "k_proj", "v_proj", "o_proj"}}


def traced(monkeypatch, **changes) -> dict:
    """{"linear": [(name, quantised)], "after": [...], "swiglu": [shapes]} of a model's products, by tracing it."""
    seen = {"linear": [], "after": [], "swiglu": []}
    of_class, quantised, network = Products.linear, products.linear, products.swiglu

    def linear_of_class(self, x, w, name, histories):
        seen["linear"].append((name, self.quantizes(name)))
        return of_class(self, x, w, name, histories)

    def linear(x, w, histories, recipe, after_attention, implementation):
        seen["after"].append((w.shape, after_attention))
        return quantised(x, w, histories, recipe, after_attention, implementation)

    def swiglu(x, gate, *rest):
        seen["swiglu"].append(gate.shape)
        return network(x, gate, *rest)

    monkeypatch.setattr(Products, "linear", linear_of_class)
    monkeypatch.setattr(products, "linear", linear)
    monkeypatch.setattr(products, "swiglu", swiglu)
    s = tiny.settings(SMALL | changes)
    model = make_model(s)
    example = jax.ShapeDtypeStruct((2, 12), jnp.int32)
    jax.eval_shape(model.init, jax.random.key(0), example, example, example)
    return seen


@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_every_projection_of_the_model_is_quantised_but_the_multi_token_one(monkeypatch, attention):
    """Attention's by name; the dense, the routed and the shared networks; E5M6 for the one after attention alone."""
    seen = traced(monkeypatch, **{"model.attention": attention})
    assert set(seen["linear"]) == {(name, True) for name in ATTENTION[attention]} | {("eh_proj", False)}
    width = 2 * (6 if attention == "mla" else 10)  # heads times their values' width: rows of o_proj alone
    assert {shape for shape, after in seen["after"] if after} == {(width, 16)}
    assert all(after == (shape == (width, 16)) for shape, after in seen["after"])
    assert set(seen["swiglu"]) == {(16, 24), (8, 16, 8), (16, 8)}  # dense, routed, shared


def test_names_in_the_config_reach_the_model(monkeypatch):
    seen = traced(monkeypatch, **{"precision.high_precision": "kv_b_proj,down_proj"})
    assert {name for name, quantised in seen["linear"] if not quantised} == {"kv_b_proj", "eh_proj"}
    assert not seen["swiglu"]


@functools.cache
def program(recipe: str) -> str:
    """The loss's and its gradient's operations, where all products that a recipe may quantise are one and the same."""
    def linear(self, x, w, name, histories):
        return jnp.dot(x, w.astype(x.dtype))

    def feed_forward(self, x, gate, up, down, histories):
        return linear(self, linear(self, x, gate + up, "", {}), down, "", {})

    def experts(self, x, gate, up, down, indices, weights, histories):
        return feed_forward(self, x, gate[0], up[0], down[0], {}) * weights.astype(x.dtype)[:, :1]

    s = tiny.settings(SMALL | {"precision.recipe": recipe})
    model, batch = make_model(s), tiny.batch()
    weights = variable_shapes(model, s)

    def loss(params, routing):
        logits, out = apply_model(model, s, params, routing, batch)
        return sum(jnp.sum(part) for part in (logits, *out["mtp_logits"])) + out["balance_loss"]

    with pytest.MonkeyPatch.context() as patch:
        for function in (linear, feed_forward, experts):
            patch.setattr(Products, function.__name__, function)
        made = jax.make_jaxpr(jax.value_and_grad(loss))(weights["params"], weights["routing"])
    assert all(leaf.dtype == jnp.float32 for leaf in made.out_avals)  # gradients of weights
    return re.sub(r"0x[0-9a-f]+", "", str(made))  # addresses of functions


@pytest.mark.parametrize("recipe", QUANTISED)
def test_all_else_is_the_bfloat16_model(recipe):
    """Embedding, head, gate, norms and attention's operators (V3 §3.3.1): operation by operation, both ways."""
    found = program(recipe)
    assert found == program("bfloat16") != program("float32")
    assert "bf16[" in found and "f8" not in found and "u8[" not in found


def refused(*assignments: str) -> str:
    with pytest.raises(RequestError) as caught:
        config.check(experiment.change(base.get_config(), assignments))
    return str(caught.value)


class TestConfig:
    def test_a_misspelt_recipe_is_refused_with_the_nearest(self):
        message = refused("precision.recipe=fp8_deepsek")
        assert message.startswith("config.precision.recipe='fp8_deepsek' must be one of float32, bfloat16, ")
        assert "fp8_deepseek" in message.split("mxfp8", 1)[1]  # the suggestion, behind the list

    def test_an_unknown_projection_is_refused_with_the_nearest(self):
        message = refused("precision.high_precision=o_proj,kv_b_prj")
        assert message.startswith("config.precision.high_precision='o_proj,kv_b_prj' has 'kv_b_prj'")
        assert "kv_b_proj" in message.split(";")[0] and message.endswith(f"are {', '.join(config.PROJECTIONS)}")
        for name in ("embed_tokens", "lm_head", "gate"):  # never quantised
            assert f"has '{name}'" in refused(f"precision.high_precision={name}")

    def test_every_projection_of_the_models_can_be_named(self):
        assert set(config.PROJECTIONS) == {"eh_proj", *FEED_FORWARD, "q_proj", *ATTENTION["mla"], *ATTENTION["gqa"]}
        config.check(experiment.change(base.get_config(), [f"precision.high_precision={','.join(config.PROJECTIONS)}"]))

    def test_delayed_scaling_is_refused_with_accumulation(self):
        pieces = ("training.batch_size=4", "training.accumulation_steps=2")
        message = refused("precision.recipe=fp8_delayed", *pieces)
        assert message.startswith("config.training.accumulation_steps=2 must be 1 with "
                                  "config.precision.recipe='fp8_delayed'")
        for name in set(RECIPES) - {"fp8_delayed"}:
            config.check(experiment.change(base.get_config(), [f"precision.recipe={name}", *pieces]))

    def test_an_unknown_implementation_is_refused(self):
        assert "must be one of auto, mosaic, xla, reference" in refused("precision.implementation=pallas")

    def test_settings_reach_the_products(self):
        s = tiny.settings(SMALL | {"precision.high_precision": "o_proj,eh_proj", "precision.implementation": "xla"})
        assert make_model(s).products == Products(RECIPES["fp8_deepseek"], ("o_proj", "eh_proj"), "xla")
