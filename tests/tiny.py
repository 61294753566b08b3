"""A model of every part at width 16, and packed batches for it."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments import base
from research.config import Settings, check
from research.model.build import variable_shapes
from research.model.transformer import Transformer
from research.precision.products import Products
from research.precision.recipe import RECIPES

VOCABULARY = 32
LENGTH = 12  # positions of a row
ROWS = ((7, 5), (4, 3, 3), (12,), (5, 6))  # documents of a batch's rows: with padding, with many, with one
FIELDS = {
    "model.vocab_size": VOCABULARY, "model.hidden_size": 16, "model.intermediate_size": 24,
    "model.num_hidden_layers": 3, "model.num_attention_heads": 2, "model.num_key_value_heads": 1, "model.head_dim": 8,
    "model.kv_lora_rank": 8, "model.qk_nope_head_dim": 8, "model.qk_rope_head_dim": 4, "model.v_head_dim": 6,
    "model.n_routed_experts": 8, "model.num_experts_per_tok": 2, "model.moe_intermediate_size": 8, "model.n_group": 4,
    "model.topk_group": 2, "model.routed_scaling_factor": 2.5, "model.initializer_range": 0.3,
    "model.scan_unroll": 1, "model.bias_update_speed": 0.01, "model.aux_loss_alpha": 0.02,
    "mtp.num_nextn_predict_layers": 2, "data.sequence_length": LENGTH, "training.steps": 20,
    "training.batch_size": 4, "optimizer.learning_rate": 0.01,
}
DENSE = {"model.n_routed_experts": 0, "model.attention": "gqa", "model.num_hidden_layers": 2,
         "mtp.num_nextn_predict_layers": 0}


def settings(changes: dict | None = None) -> Settings:
    """Checked settings of the tiny model; changes: {`group.field`: value}."""
    config = base.get_config()
    config.update_from_flattened_dict(FIELDS | (changes or {}))
    return check(config)


def model(s: Settings, seed: int = 0, experts: str = "reference"):
    """(model, {`params`, `routing`}) with random weights in which nothing is neutral: no gain 1, no bias 0.

    experts: the implementation; the reference compiles in a third of the time.
    """
    built = Transformer(s.model, s.mtp, Products(RECIPES[s.precision.recipe], experts_implementation=experts))
    return built, filled(variable_shapes(built, s), seed)


def filled(shapes, seed: int):
    """Arrays of these shapes by their names: gains about 1, biases about 0, and 0.3 * normal for the others."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        name = path[-1].key
        return jnp.asarray(1 + 0.1 * noise if name == "scale" else (0.1 if name.endswith("bias") else 0.3) * noise)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def batch(rows=ROWS, length: int = LENGTH, seed: int = 0) -> dict:
    """Random tokens in documents of these lengths, filled up with padding; the shape of `research.data.packing`."""
    rng = np.random.default_rng(seed)
    tokens_BT = rng.integers(1, VOCABULARY, (len(rows), length + 1)).astype(np.int32)
    segments_BT = np.zeros((len(rows), length + 1), np.int32)
    positions_BT = np.zeros((len(rows), length), np.int32)
    for row, documents in enumerate(rows):
        start = 0
        for number, size in enumerate(documents, start=1):
            segments_BT[row, start:start + size] = number
            positions_BT[row, start:start + size] = np.arange(size)
            start += size
    tokens_BT[segments_BT == 0] = 0
    inside_BT = (segments_BT[:, 1:] == segments_BT[:, :-1]) & (segments_BT[:, 1:] > 0)
    return {"tokens_BT": tokens_BT[:, :-1], "targets_BT": tokens_BT[:, 1:], "segments_BT": segments_BT[:, :-1],
            "positions_BT": positions_BT, "mask_BT": inside_BT}


def balanced(loss: float) -> dict:
    """What a model with a multi-token module says of its routing, where the layers' balance loss is this."""
    return {"balance_loss": loss + 7, "routing": {
        "layers": {"balance_loss": jnp.array([loss]), "loads": jnp.ones((1, 2))},
        "mtp": [{"balance_loss": jnp.array(7.0), "loads": jnp.ones(2)}]}}


def leaves(tree) -> dict:
    """{`a/b/c`: float64 array} of the leaves."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path): np.asarray(x, np.float64)
            for path, x in flat}


def assert_close(actual, expected, rtol=2e-5, atol=2e-6):
    """Every leaf, by name; atol is relative to the largest value of the leaf, or to 0.1 if that is less."""
    actual, expected = leaves(actual), leaves(expected)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(float(np.max(np.abs(value), initial=0)), 0.1)
        np.testing.assert_allclose(actual[name], value, rtol=rtol, atol=atol * scale, err_msg=name)
