"""The model's forward pass over a cache: the modules that train, layer by layer.

Layers are kept apart here: a scan over stacked ones would copy the weights of each, and the whole cache, at every
token.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kernels import few_rows, weight_only
from kernels.weight_only import Blocks, Narrow
from research.model.layers import rms_norm
from research.model.mtp import MultiTokenModule
from research.model.transformer import Block, Transformer
from research.precision.matmul import matmul
from research.precision.products import FEED_FORWARD, Products
from research.precision.recipe import RECIPES
from research.tree import map_paths


def decoding_model(model: Transformer, recipe: str | None = None) -> Transformer:
    """The model under the recipe that decodes: the given one, or its own; of an FP8 recipe the 16-bit activations.

    FP8 recipes are for training: decoding reads the weights as they are kept. Its routed experts have no gradient; over
    a mesh, where there is one, they and the projections are as in training.
    """
    chosen, mesh = RECIPES[recipe] if recipe else model.products.recipe, model.products.mesh
    over = {"experts_implementation": "inference"} if mesh is None else {
        "mesh": mesh, "expert_room": model.products.expert_room}
    products = Products(RECIPES[chosen.activations], **over)
    return Transformer(model.config, model.mtp, products)


WEIGHTS = ("int8", "int4", "fp8_blocks")
OUTPUTS = 16384  # that are quantised at once, in float32: 1/9 of Qwen2's vocabulary
NARROW = (*FEED_FORWARD, "q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa",
          "eh_proj")


def storage(model: Transformer, weights: str | None) -> dict[str, str | None]:
    """Formats of the projections with the routed experts, of the embedding and of the head; None: the recipe's dtype.

    weights: None; int8 or int4, where the embedding has 8 bits in either, and so has a head that is its transpose (of a
    row too little is saved); fp8_blocks, as DeepSeek-V3 is released: embedding, head and `eh_proj` stay floats (and
    `kv_b_proj`, for its two factors are absorbed: see `prepare`). Else ValueError.
    """
    if weights not in (None, *WEIGHTS):
        raise ValueError(f"weights={weights!r} must be one of {', '.join(WEIGHTS)}")
    if weights is None or weights == "fp8_blocks":
        return {"projections": weights and "e4m3", "embed_tokens": None, "lm_head": None}
    return {"projections": weights, "embed_tokens": "int8",
            "lm_head": "int8" if model.config.tie_word_embeddings else weights}


def prepare(variables, model, weights: str | None = None):
    """Weights as decoding reads them, from {`params`, `routing`}: {`layers`: [variables of a block], `mtp`: [of a
    module], `embed_tokens`, `lm_head` (D, V), `norm`}; without `lm_head` where the embedding in 8 bits is that too.

    Layer by layer: of weights that are read when they are asked for (research/interop/variables.py) one layer stands
    beside the result. Matrices are cast to the recipe's dtype once; gates, norms and biases are in float32. MLA's
    `kv_b_proj` becomes `k_b_proj` (N, H, R) and `v_b_proj` (N, R, J), the two factors that are absorbed. weights: see
    `storage`.
    """
    params, routing = variables["params"], variables["routing"]
    whole = partial(jax.tree.map, lambda x: x[...])  # read here, where it has not been yet

    def block(tree, biases):  # waited for: else the copies of all layers would stand in a queue
        return jax.block_until_ready(_prepared(tree, biases, model, weights))

    def unstacked(name):
        stack, biases = params.get(name), routing.get(name, {})
        number = jax.tree.leaves(stack)[0].shape[0] if stack else 0
        return [block(*jax.tree.map(lambda x, i=i: x[i], (stack, biases))) for i in range(number)]

    def module(k):
        tree, biases = whole((params[f"mtp_{k}"], routing.get(f"mtp_{k}", {})))
        inner = block(tree.pop("block"), biases.get("block", {}))
        joined = {"params": _kept(tree, model, weights) | {"block": inner["params"]}}
        return joined | ({"routing": {"block": inner["routing"]}} if "routing" in inner else {})

    ends = whole({name: params[name] for name in ("embed_tokens", "norm", "lm_head") if name in params})
    return prepare_ends(ends, model, weights) | {
        "layers": unstacked("dense_layers") + unstacked("layers"),
        "mtp": [module(k) for k in range(1, model.mtp.num_nextn_predict_layers + 1)],
    }


def _kept(tree, model, weights: str | None):
    """Parameters of a block or a module as decoding reads them."""
    format = storage(model, weights)["projections"]

    def keep(path, x):
        if path.endswith(("/scale", "/bias", "gate/kernel")):
            return jnp.asarray(x, jnp.float32)
        name = path.removesuffix("/kernel").split("/")[-1]
        released_in_16 = weights == "fp8_blocks" and name == "eh_proj"
        return _stored(x, format if name in NARROW and not released_in_16 else None, model)

    return map_paths(keep, tree, is_leaf=lambda x: isinstance(x, Blocks))


def _stored(w_DF, format: str | None, model):
    """A matrix in a format of `storage`; of a stack one after the other, so that few stand in floats at once."""
    dtype = str(model.products.dtype)
    if len(w_DF.shape) == 3 and (format or isinstance(w_DF, Blocks)):
        return lax.map(lambda w_DF: _stored(w_DF, format, model), w_DF)
    if isinstance(w_DF, Blocks):
        kept = weight_only.of_blocks(w_DF, dtype)
        if format == kept.format:
            return kept
        w_DF = weight_only.dequantize(kept)
    if format is None:
        return jnp.asarray(w_DF, dtype)
    parts = [_quantize(jnp.asarray(w_DF[:, first:first + OUTPUTS]), format, None, dtype)
             for first in range(0, w_DF.shape[1], OUTPUTS)]
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)


_quantize = jax.jit(weight_only.quantize, static_argnums=(1, 2, 3))


def prepare_block(tree, biases, model, weights: str | None = None):
    """Variables of a layer as decoding reads them, from its parameters and its routing bias ({}: it has none)."""
    m = model.config
    if m.attention == "mla":
        attention = dict(tree["attention"])
        kv_RC = _stored(attention.pop("kv_b_proj")["kernel"], None, model)
        kv_RNC = kv_RC.reshape(m.kv_lora_rank, m.num_attention_heads, -1)
        k_RNH, v_RNJ = jnp.split(kv_RNC, [m.qk_nope_head_dim], axis=-1)
        attention |= {"k_b_proj": {"kernel": k_RNH.transpose(1, 2, 0)},
                      "v_b_proj": {"kernel": v_RNJ.transpose(1, 0, 2)}}
        tree = tree | {"attention": attention}
    kept = _kept(tree, model, weights)
    floats = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), biases)
    return {"params": kept} | ({"routing": floats} if biases else {})


_prepared = jax.jit(prepare_block, static_argnums=(2, 3))  # traced once, whoever takes weights again


def prepare_ends(params, model, weights: str | None = None):
    """{`embed_tokens`, `lm_head`, `norm`} as decoding reads them; a quantised tied head is the embedding itself."""
    formats, tied = storage(model, weights), model.config.tie_word_embeddings
    embedding_VD = params["embed_tokens"]
    ends = {"norm": jnp.asarray(params["norm"]["scale"], jnp.float32), "embed_tokens": (
        _stored(embedding_VD, None, model) if formats["embed_tokens"] is None else
        _stored(embedding_VD.T, formats["embed_tokens"], model))}
    if tied and formats["lm_head"]:
        return ends
    head_DV = embedding_VD.T if tied else params["lm_head"]
    return ends | {"lm_head": _stored(head_DV, formats["lm_head"], model)}


def with_rows(variables, rows, *path):
    """A module's variables with `rows` as the cache of the attention at `path`."""
    tree = {"attention": {"rows": rows}}
    for name in reversed(path):
        tree = {name: tree}
    return variables | {"cache": tree}


def embed(model, weights, tokens_BT):
    embedding = weights["embed_tokens"]
    if isinstance(embedding, Narrow):
        return weight_only.rows(embedding, tokens_BT)
    return model.products.looked_up(embedding, tokens_BT)


def head(model, weights, hidden_BTD):
    """Logits (B, T, V) in float32."""
    B, T, D = hidden_BTD.shape
    hidden_XD, w_DV = hidden_BTD.reshape(-1, D), weights.get("lm_head", weights["embed_tokens"])
    if isinstance(w_DV, Narrow):
        logits_XV = weight_only.product(hidden_XD, w_DV)
    elif model.products.mesh is None:
        logits_XV = few_rows.product(hidden_XD, w_DV)
    else:
        logits_XV = matmul(hidden_XD, w_DV, (w_DV.dtype,) * 3)
    return logits_XV.reshape(B, T, -1)


def forward(model, weights, rows: list, tokens_BT, positions_BT):
    """The main model on tokens at consecutive positions: (hidden_BTD after the final norm, before it, rows)."""
    m, new = model.config, []
    n_dense = m.first_k_dense_replace if m.n_routed_experts else m.num_hidden_layers
    x_BTD, valid_BT = embed(model, weights, tokens_BT), jnp.ones_like(tokens_BT, bool)
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
        with_rows(weights["mtp"][depth - 1], rows, "block"), hidden_BTD, embed(model, weights, tokens_BT), None,
        positions_BT, jnp.ones_like(tokens_BT, bool), mutable="cache")
    handed_on = after if model.mtp.hidden == "after_norm" else before
    return after, handed_on, changed["cache"]["block"]["attention"]["rows"]
