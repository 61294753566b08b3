"""From settings to a model and its first weights."""

import jax
import jax.numpy as jnp

from research.model.transformer import Transformer
from research.precision.matmul import Products
from research.precision.recipe import RECIPES


def make_model(settings) -> Transformer:
    """The model of the settings, whose `model.vocab_size` is resolved."""
    return Transformer(settings.model, settings.mtp, Products(RECIPES[settings.precision.recipe]))


def init_variables(model: Transformer, settings, seed: int):
    """{`params`, `routing`} at step 0, drawn from the seed."""
    example = jnp.ones((1, min(8, settings.data.sequence_length)), jnp.int32)
    variables = model.init(jax.random.key(seed), example, example, example)
    return {"params": variables["params"], "routing": variables.get("routing", {})}
