"""The model's forward pass over a cache: the modules that train, layer by layer.

Layers are kept apart here: a scan over stacked ones would copy the weights of each, and the whole cache, at every
token.
"""

import jax
import jax.numpy as jnp

from research.model.layers import rms_norm
from research.model.mtp import MultiTokenModule
from research.model.transformer import Block, Transformer
from research.precision.matmul import matmul
from research.precision.products import Products
from research.precision.recipe import RECIPES
from research.tree import map_paths


def decoding_model(model: Transformer, recipe: str | None = None) -> Transformer:
    """The model under the recipe that decodes: the given one, or its own; of an FP8 recipe the 16-bit activations.

    FP8 recipes are for training: decoding reads the weights as they are kept. Its routed experts have no gradient.
    """
    chosen = RECIPES[recipe] if recipe else model.products.recipe
    products = Products(RECIPES[chosen.activations], experts_implementation="inference")
    return Transformer(model.config, model.mtp, products)


def prepare(variables, model):
    """Weights as decoding reads them, from {`params`, `routing`}: {`layers`: [variables of a block], `mtp`: [of a
    module], `embed_tokens`, `lm_head` (D, V), `norm`}.

    Matrices are cast to the recipe's dtype once; gates, norms and biases stay in float32. MLA's `kv_b_proj` becomes
    `k_b_proj` (N, H, R) and `v_b_proj` (N, R, J), the two factors that are absorbed.
    """
    m, dtype = model.config, model.products.dtype
    params, routing = variables["params"], variables["routing"]

    def cast(path, x):
        kept = path.endswith(("/scale", "/bias", "gate/kernel"))
        return jnp.asarray(x) if kept else jnp.asarray(x).astype(dtype)

    def block(tree, biases):
        if m.attention == "mla":
            attention = dict(tree["attention"])
            kv_RNC = jnp.asarray(attention.pop("kv_b_proj")["kernel"]).reshape(
                m.kv_lora_rank, m.num_attention_heads, -1)
            k_RNH, v_RNJ = jnp.split(kv_RNC, [m.qk_nope_head_dim], axis=-1)
            attention |= {"k_b_proj": {"kernel": k_RNH.transpose(1, 2, 0)},
                          "v_b_proj": {"kernel": v_RNJ.transpose(1, 0, 2)}}
            tree = tree | {"attention": attention}
        return {"params": map_paths(cast, tree)} | ({"routing": biases} if biases else {})

    def unstacked(name):
        stack, biases = params.get(name), routing.get(name, {})
        number = jax.tree.leaves(stack)[0].shape[0] if stack else 0
        return [block(*jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), (stack, biases))) for i in range(number)]

    def module(k):
        tree, biases = dict(params[f"mtp_{k}"]), routing.get(f"mtp_{k}", {})
        inner = block(tree.pop("block"), biases.get("block", {}))
        joined = {"params": map_paths(cast, tree) | {"block": inner["params"]}}
        return joined | ({"routing": {"block": inner["routing"]}} if "routing" in inner else {})

    head = params["embed_tokens"].T if m.tie_word_embeddings else params["lm_head"]
    return {
        "layers": unstacked("dense_layers") + unstacked("layers"),
        "mtp": [module(k) for k in range(1, model.mtp.num_nextn_predict_layers + 1)],
        "embed_tokens": jnp.asarray(params["embed_tokens"]).astype(dtype),
        "lm_head": jnp.asarray(head).astype(dtype),
        "norm": jnp.asarray(params["norm"]["scale"]),
    }


def with_rows(variables, rows, *path):
    """A module's variables with `rows` as the cache of the attention at `path`."""
    tree = {"attention": {"rows": rows}}
    for name in reversed(path):
        tree = {name: tree}
    return variables | {"cache": tree}


def embed(weights, tokens_BT):
    return weights["embed_tokens"][tokens_BT]


def head(weights, hidden_BTD):
    """Logits (B, T, V) in float32."""
    B, T, D = hidden_BTD.shape
    return matmul(hidden_BTD.reshape(-1, D), weights["lm_head"], (hidden_BTD.dtype,) * 3).reshape(B, T, -1)


def forward(model, weights, rows: list, tokens_BT, positions_BT):
    """The main model on tokens at consecutive positions: (hidden_BTD after the final norm, before it, rows)."""
    m, new = model.config, []
    n_dense = m.first_k_dense_replace if m.n_routed_experts else m.num_hidden_layers
    x_BTD, valid_BT = embed(weights, tokens_BT), jnp.ones_like(tokens_BT, bool)
    for number, (layer, layer_rows) in enumerate(zip(weights["layers"], rows, strict=True)):
        (x_BTD, _), changed = Block(m, model.products, dense=number < n_dense).apply(
            with_rows(layer, layer_rows), x_BTD, None, positions_BT, valid_BT, mutable="cache")
        new.append(changed["cache"]["attention"]["rows"])
    return rms_norm(x_BTD, weights["norm"], m.rms_norm_eps), x_BTD, new


def mtp_forward(model, weights, depth: int, rows, hidden_BTD, tokens_BT, positions_BT):
    """Module `depth` (from 1) on the hidden states of consecutive positions and the token that is `depth` further.

    Returns (what its head reads, what the next module reads, rows).
    """
    module = MultiTokenModule(model.config, model.products, Block)
    (before, after, _), changed = module.apply(
        with_rows(weights["mtp"][depth - 1], rows, "block"), hidden_BTD, embed(weights, tokens_BT), None,
        positions_BT, jnp.ones_like(tokens_BT, bool), mutable="cache")
    handed_on = after if model.mtp.hidden == "after_norm" else before
    return after, handed_on, changed["cache"]["block"]["attention"]["rows"]
