"""The model's forward pass over a cache: the modules that train, layer by layer.

Layers are kept apart here: a scan over stacked ones would copy the weights of each, and the whole cache, at every
token.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels import few_rows, weight_only
from kernels.weight_only import Narrow
from research.model.layers import rms_norm
from research.model.mtp import MultiTokenModule
from research.model.transformer import Block, Transformer
from research.precision.products import FEED_FORWARD, Products
from research.precision.recipe import RECIPES
from research.tree import map_paths


def decoding_model(model: Transformer, recipe: str | None = None) -> Transformer:
    """The model under the recipe that decodes: the given one, or its own; of an FP8 recipe the 16-bit activations.

    FP8 recipes are for training: decoding reads the weights as they are kept. Its routed experts have no gradient.
    """
    chosen = RECIPES[recipe] if recipe else model.products.recipe
    products = Products(RECIPES[chosen.activations], experts_implementation="inference")
    return Transformer(model.config, model.mtp, products)


OUTPUTS = 16384  # that are quantised at once, in float32: 1/9 of Qwen2's vocabulary
NARROW = (*FEED_FORWARD, "q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa",
          "eh_proj")


def storage(model: Transformer, weights: str | None) -> dict[str, int | None]:
    """Bits of the projections, the embedding and the head; None: the recipe's dtype. weights: None, int8 or int4.

    The embedding has 8 bits in either, and so has a head that is its transpose: of a row too little is saved.
    ValueError for routed experts.
    """
    if weights is None:
        return {"projections": None, "embed_tokens": None, "lm_head": None}
    if weights not in weight_only.BITS:
        raise ValueError(f"weights={weights!r} must be one of {', '.join(weight_only.BITS)}")
    if model.config.n_routed_experts:
        raise ValueError(f"weights={weights!r} needs a model without routed experts: it has "
                         f"{model.config.n_routed_experts}, which are not quantised")
    bits = weight_only.BITS[weights]
    return {"projections": bits, "embed_tokens": 8, "lm_head": 8 if model.config.tie_word_embeddings else bits}


def prepare(variables, model, weights: str | None = None):
    """Weights as decoding reads them, from {`params`, `routing`}: {`layers`: [variables of a block], `mtp`: [of a
    module], `embed_tokens`, `lm_head` (D, V), `norm`}; without `lm_head` where the embedding in 8 bits is that too.

    Layer by layer: of weights in numpy's memory no whole copy stands beside the result. Matrices are cast to the
    recipe's dtype once; gates, norms and biases are in float32. MLA's `kv_b_proj` becomes `k_b_proj` (N, H, R) and
    `v_b_proj` (N, R, J), the two factors that are absorbed. weights: see `storage`.
    """
    params, routing = variables["params"], variables["routing"]

    def block(tree, biases):  # waited for: else the copies of all layers would stand in a queue
        return jax.block_until_ready(_prepared(tree, biases, model, weights))

    def unstacked(name):
        stack, biases = params.get(name), routing.get(name, {})
        number = jax.tree.leaves(stack)[0].shape[0] if stack else 0
        return [block(*jax.tree.map(lambda x, i=i: x[i], (stack, biases))) for i in range(number)]

    def module(k):
        tree, biases = dict(params[f"mtp_{k}"]), routing.get(f"mtp_{k}", {})
        inner = block(tree.pop("block"), biases.get("block", {}))
        joined = {"params": map_paths(partial(keep, model=model, weights=weights), tree) | {"block": inner["params"]}}
        return joined | ({"routing": {"block": inner["routing"]}} if "routing" in inner else {})

    return prepare_ends(params, model, weights) | {
        "layers": unstacked("dense_layers") + unstacked("layers"),
        "mtp": [module(k) for k in range(1, model.mtp.num_nextn_predict_layers + 1)],
    }


def keep(path: str, x, model, weights: str | None):
    """A parameter of a block or a module as decoding reads it."""
    if path.endswith(("/scale", "/bias", "gate/kernel")):
        return jnp.asarray(x, jnp.float32)
    bits = storage(model, weights)["projections"]
    name = path.removesuffix("/kernel").split("/")[-1]
    return _stored(jnp.asarray(x), bits if name in NARROW else None, model)


def _stored(w_DF, bits: int | None, model):
    dtype = model.products.dtype
    if bits is None:
        return jnp.asarray(w_DF, dtype)
    parts = [_quantize(w_DF[:, first:first + OUTPUTS], bits, None, str(dtype))
             for first in range(0, w_DF.shape[1], OUTPUTS)]
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)


_quantize = jax.jit(weight_only.quantize, static_argnums=(1, 2, 3))


def prepare_block(tree, biases, model, weights: str | None = None):
    """Variables of a layer as decoding reads them, from its parameters and its routing bias ({}: it has none)."""
    m = model.config
    if m.attention == "mla":
        attention = dict(tree["attention"])
        kv_RNC = jnp.asarray(attention.pop("kv_b_proj")["kernel"]).reshape(m.kv_lora_rank, m.num_attention_heads, -1)
        k_RNH, v_RNJ = jnp.split(kv_RNC, [m.qk_nope_head_dim], axis=-1)
        attention |= {"k_b_proj": {"kernel": k_RNH.transpose(1, 2, 0)},
                      "v_b_proj": {"kernel": v_RNJ.transpose(1, 0, 2)}}
        tree = tree | {"attention": attention}
    kept = map_paths(partial(keep, model=model, weights=weights), tree)
    floats = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), biases)
    return {"params": kept} | ({"routing": floats} if biases else {})


_prepared = jax.jit(prepare_block, static_argnums=(2, 3))  # traced once, whoever takes weights again


def prepare_ends(params, model, weights: str | None = None):
    """{`embed_tokens`, `lm_head`, `norm`} as decoding reads them; a quantised tied head is the embedding itself."""
    bits, tied = storage(model, weights), model.config.tie_word_embeddings
    embedding_VD = params["embed_tokens"]
    ends = {"norm": jnp.asarray(params["norm"]["scale"], jnp.float32), "embed_tokens": (
        _stored(embedding_VD, None, model) if bits["embed_tokens"] is None else
        _stored(embedding_VD.T, bits["embed_tokens"], model))}
    if tied and bits["lm_head"]:
        return ends
    head_DV = embedding_VD.T if tied else params["lm_head"]
    return ends | {"lm_head": _stored(head_DV, bits["lm_head"], model)}


def with_rows(variables, rows, *path):
    """A module's variables with `rows` as the cache of the attention at `path`."""
    tree = {"attention": {"rows": rows}}
    for name in reversed(path):
        tree = {name: tree}
    return variables | {"cache": tree}


def embed(weights, tokens_BT):
    embedding = weights["embed_tokens"]
    return weight_only.rows(embedding, tokens_BT) if isinstance(embedding, Narrow) else embedding[tokens_BT]


def head(weights, hidden_BTD):
    """Logits (B, T, V) in float32."""
    B, T, D = hidden_BTD.shape
    hidden_XD, w_DV = hidden_BTD.reshape(-1, D), weights.get("lm_head", weights["embed_tokens"])
    product = weight_only.product if isinstance(w_DV, Narrow) else few_rows.product
    logits_XV = product(hidden_XD, w_DV)
    return logits_XV.reshape(B, T, -1)


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
