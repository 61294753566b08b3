"""Bytes of a training step, leaf by leaf, by shape evaluation: `python -m research.accounting.memory --config=FILE`.

Prints, for each recipe, the bytes of the weights, of the optimiser's state, and of what the forward pass keeps for the
backward pass, as on an H200 (whose kernels pad, lay out and recompute otherwise than plain XLA on a CPU). Nothing is
allocated or compiled.
"""

import contextlib
import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from absl import flags
from jax.extend.core import Literal
from jax.sharding import AbstractMesh
from ml_collections import FrozenConfigDict
from tqdm import tqdm

from kernels.choice import H200, meant_for_h200
from research import command, config
from research.accounting.parameters import is_routed_expert, shapes
from research.accounting.request import settings_of
from research.environment import runnable
from research.errors import RequestError, nearest
from research.model.build import make_model, variable_shapes
from research.model.moe import in_float32
from research.parallel import pipeline
from research.parallel.experts import window_and_pairs
from research.parallel.mesh import TYPES
from research.parallel.rules import AXES, axes_of
from research.precision.quantize import weight
from research.precision.recipe import RECIPES
from research.training.optimizer import make_optimizer
from research.training.step import abstract_batch, loss_of

FLAGS = flags.FlagValues()
_CONFIG = flags.DEFINE_string("config", None, "The experiment: FILE.py or FILE.py:arm.", FLAGS)
_RECIPES = flags.DEFINE_list("recipes", ["float32", "bfloat16", "fp8_deepseek"], "Which recipes to count.", FLAGS)
_FIELDS = flags.DEFINE_multi_string("config.", [], "--config.group.field=value changes a field.", FLAGS)


def kept_by(function, *arguments) -> list[jax.ShapeDtypeStruct]:
    """The residuals of `function`, differentiated by its first argument: arrays that are not among its arguments."""
    def forward(first, *rest):
        return jax.tree.leaves(jax.vjp(lambda x: function(x, *rest), first)[1])

    jaxpr = jax.make_jaxpr(forward)(*arguments).jaxpr
    kept = dict.fromkeys(x for x in jaxpr.outvars if not isinstance(x, Literal) and x not in set(jaxpr.invars))
    return [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in kept]


def parts(settings, tokens: int) -> dict[str, list[jax.ShapeDtypeStruct]]:
    """What is kept of so many tokens by a projection (hidden_size wide), the one after attention, a dense and a routed
    feed-forward network."""
    m, products = settings.model, make_model(settings).products
    D = m.hidden_size

    made = jax.lax.optimization_barrier  # x is some operation's result: arguments would not count

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    def linear(name, features):
        return kept_by(lambda x_w: products.linear(made(x_w[0]), x_w[1], name, {}),
                       (array(tokens, features, dtype=products.dtype), array(features, D)))

    value_width = m.v_head_dim if m.attention == "mla" else m.head_dim
    dense = array(D, m.intermediate_size), array(D, m.intermediate_size), array(m.intermediate_size, D)
    found = {"projection": linear("q_proj", D), "o_proj": linear("o_proj", m.num_attention_heads * value_width),
             "dense": kept_by(lambda x_w: products.feed_forward(made(x_w[0]), *x_w[1:], {}),
                              (array(tokens, D, dtype=products.dtype), *dense))}
    if m.n_routed_experts:
        found["experts"] = _kept_by_experts(settings, tokens)
    return found


def _kept_by_experts(settings, tokens: int, mesh=None, gate=False) -> list[jax.ShapeDtypeStruct]:
    """What is kept of so many tokens by a layer's routed experts and, if so, its gate; on one device or by all of a
    mesh."""
    m, products = settings.model, make_model(settings, mesh).products
    E, D, F, K = m.n_routed_experts, m.hidden_size, m.moe_intermediate_size, m.num_experts_per_tok

    def run(x_w, indices_XK, weights_XK):
        x, kernel_DE, *weights = x_w
        x_XD = jax.lax.optimization_barrier(x)
        y_XD = products.experts(x_XD, *weights, indices_XK, weights_XK, {})
        return y_XD, in_float32(x_XD, kernel_DE) if gate else None

    weights = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((D, E), (E, D, F), (E, D, F), (E, F, D)))
    with jax.sharding.use_abstract_mesh(mesh) if mesh else contextlib.nullcontext():
        return kept_by(run, (jax.ShapeDtypeStruct((tokens, D), products.dtype), *weights),
                       jax.ShapeDtypeStruct((tokens, K), jnp.int32), jax.ShapeDtypeStruct((tokens, K), jnp.float32))


def of_model(settings, tokens: int) -> list[jax.ShapeDtypeStruct]:
    """What is kept of so many tokens, in rows of the config's length, by the whole model with its losses."""
    model, rows = make_model(settings), tokens // settings.data.sequence_length
    variables = variable_shapes(model, settings)

    def loss(params, variables, batch):
        trained = {"params": params, "amax": variables["amax"]}
        return loss_of(trained, variables["routing"], batch, 1.0, 1, 1.0, model, settings)[0]

    return kept_by(loss, variables["params"], variables, abstract_batch(rows, settings.data.sequence_length))


def bytes_of(leaves) -> int:
    """As they are stored."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def needed_by(leaves) -> int:
    """Bytes, of which E5M6, stored as float16 as nothing else is, takes 12 bits an entry."""
    return sum(leaf.size * 12 // 8 if leaf.dtype == jnp.float16 else leaf.size * leaf.dtype.itemsize for leaf in leaves)


def with_plain_attention(settings):
    """The settings without cuDNN's attention, which asks for the library and keeps its output too."""
    if settings.model.attention_implementation not in ("auto", "cudnn"):
        return settings
    return replace(settings, model=FrozenConfigDict({**settings.model, "attention_implementation": "xla"}))


def of_device(settings, gpu: bool) -> dict[str, int]:
    """Bytes of one device of the settings' mesh in training, on a Hopper GPU or, not `gpu`, on this machine's device.

    weights: as the products read them (16 bits, or the 8-bit copies); master, moments, average (of the weights):
    float32, moments as the config says. Everything that one weight has is divided by fsdp, tensor and pipeline, routed
    experts by expert; moments and average also by the rest of the mesh (ZeRO-1). activations: what the forward
    pass keeps of a device's rows of one of the `accumulation_steps` pieces; the experts of a device of the axis expert
    have room for `training.expert_room` times those that a balanced router sends. buffers: what the backward pass has
    beside them at its beginning, without what a further round of experts would have. gradients: of one piece;
    accumulated: their sum over several. transposed: what XLA for GPUs lays out anew to gather it over fsdp. total: the
    largest sum that is alive at once, where gradients take the place of activations, unless layers are a loop, as on a
    GPU: its arrays of all layers live as long as it runs.

    Of deep dense models XLA:CPU takes more than that, it is not known why: nano in float32 without experts, 672 wide,
    44 rows of 52, takes 1.07, 1.24 and 1.27 times this total with 1, 4 and 12 layers (one the multi-token module's).

    A pipeline is the one that training runs (parallel/pipeline.py): each stage holds a copy of all that is not in the
    layers they share, and of the micro-batches on their way what it has received and, under `zero_bubble`, what the
    gradients of weights that wait are made of. Where it does not divide those layers
    (training refuses that, V3 did it) everything is divided by it all the same, an average of stages, of whom each
    keeps the activations of as many micro-batches as there are stages.
    """
    if settings.mesh.pipeline > 1 and not pipeline.shared_layers(settings.model) % settings.mesh.pipeline:
        return _of_stage(settings, gpu)
    settings = with_plain_attention(settings)
    if not gpu and not settings.model.scan_unroll:  # XLA computes once what is written twice: nothing is computed again
        settings = replace(settings, model=FrozenConfigDict({**settings.model, "remat": "none"}))  # outside of loops
    if not gpu and settings.precision.recipe == "bfloat16":  # XLA:CPU multiplies 16 bits through float32 copies, and
        settings = with_recipe(settings, "float32")  # keeps those
    mesh, pieces, recipe = settings.mesh, settings.training.accumulation_steps, RECIPES[settings.precision.recipe]
    devices = mesh.data * mesh.fsdp * mesh.expert * mesh.tensor * mesh.pipeline
    params = shapes(settings)
    sizes = {path: leaf.size for path, leaf in params.items()}
    routed = sum(size for path, size in sizes.items() if is_routed_expert(path))
    total = sum(sizes.values())
    held = (total - routed + routed / mesh.expert) / (mesh.fsdp * mesh.tensor * mesh.pipeline)
    rows = settings.training.batch_size // (mesh.data * mesh.fsdp * mesh.expert * pieces)
    tokens = rows * settings.data.sequence_length
    alone = replace(settings, mesh=FrozenConfigDict({axis: 1 for axis in mesh}),  # what all meshes and pieces share
                    training=FrozenConfigDict({**settings.training, "accumulation_steps": 1}))
    kept, copies = _kept_and_copies(alone, rows * mesh.expert, gpu)
    in_flight = min(mesh.pipeline, pieces) / mesh.pipeline
    of = {
        "weights": 4 * held if recipe.name == "float32" else copies * held / total if recipe.quantized else 2 * held,
        "master": 0 if recipe.name == "float32" else 4 * held,
        "transposed": 4 * _transposed(params, mesh) if gpu else 0,
        "gradients": 4 * held,
        "accumulated": 4 * held if pieces > 1 else 0,
        "moments": bytes_of(jax.tree.leaves(jax.eval_shape(make_optimizer(settings).init, params))) / devices,
        "average": 4 * total / devices if settings.training.ema_decay else 0,
        "activations": (kept / (mesh.expert * mesh.tensor) + _kept_in_room(settings, tokens, gpu)) * in_flight,
        "buffers": _passing(settings, tokens) / mesh.tensor,
    }
    passing = of["activations"], of["buffers"], of["gradients"]
    # no loop over layers, which has all to its end; stages that training here refuses are taken to add a piece's
    # gradients to their sum as they are made, which ours do not
    if mesh.pipeline > 1 or not (gpu or settings.model.scan_unroll):
        passing = (max(of["activations"] + of["buffers"], of["gradients"]),)
    of["total"] = sum((of["weights"], of["master"], of["moments"], of["average"], of["transposed"], of["accumulated"],
                       *passing))
    return {name: round(size) for name, size in of.items()}


def _of_stage(settings, gpu: bool) -> dict[str, int]:
    """A device of a stage, as of a mesh without the others."""
    mesh, pieces, stage = settings.mesh, settings.training.accumulation_steps, pipeline.of_stage(settings)
    of, products = of_device(stage, gpu), make_model(settings).products
    tokens = settings.training.batch_size * settings.data.sequence_length // (
        mesh.data * mesh.fsdp * mesh.expert * pieces)
    widths = pipeline.held(mesh.pipeline, pieces) * settings.model.hidden_size
    if settings.training.pipeline_schedule == "zero_bubble":
        widths += (mesh.pipeline + 1) * sum(
            leaf.size // math.prod(leaf.shape[-2:]) * sum(leaf.shape[-2:])
            for path, leaf in shapes(stage).items() if products.puts_off(path))
    on_their_way = tokens * widths * products.dtype.itemsize
    return of | {"activations": of["activations"] + on_their_way, "total": of["total"] + on_their_way}


def with_recipe(settings, name: str):
    """The settings under another recipe."""
    return replace(settings, precision=FrozenConfigDict({**settings.precision, "recipe": name}))


def _transposed(params, mesh) -> float:
    """How many weights of a device XLA for GPUs holds a second time: it gathers along an array's first dimension, and
    lays the matrices that fsdp splits along another out that way before the loops that gather them. (Embeddings are not
    gathered.)"""
    def entries(path, leaf):
        routed = is_routed_expert(path)
        axes = axes_of(path, min(len(leaf.shape), 3 if routed else 2), "")
        if mesh.fsdp == 1 or path.endswith("embed_tokens") or "fsdp" not in axes[1:]:
            return 0
        return leaf.size / (mesh.fsdp * mesh.tensor * mesh.pipeline * (mesh.expert if routed else 1))

    return sum(entries(path, leaf) for path, leaf in params.items())


def _passing(settings, tokens: int) -> float:
    """Bytes that the backward pass has of so many tokens besides what is kept: the logits' softmax and gradient, or
    what a layer of experts has of its rows (three as wide as the model, six as an expert), whichever is more."""
    m = settings.model
    logits = 2 * 4 * tokens * m.vocab_size
    if not m.n_routed_experts:
        return logits
    width = jnp.dtype(RECIPES[settings.precision.recipe].activations).itemsize
    n, K = settings.mesh.expert, m.num_experts_per_tok
    rows = tokens * K if n == 1 else window_and_pairs(
        n, settings.training.expert_room, tokens, K, m.n_routed_experts // n)[1]
    return max(logits, width * rows * (3 * m.hidden_size + 6 * m.moe_intermediate_size))


def _kept_in_room(settings, tokens: int, gpu: bool) -> float:
    """Bytes that all layers' experts keep on a device of mesh.expert beyond its share of what one device would keep of
    the tokens of all: the tokens that have come, and room that may stay empty."""
    n, devices = settings.mesh.expert, settings.mesh.expert * settings.mesh.tensor
    if n == 1 or settings.model.remat == "layer":
        return 0
    mesh = AbstractMesh(tuple(settings.mesh[axis] if axis in ("expert", "tensor") else 1 for axis in AXES), AXES,
                        axis_types=TYPES, abstract_device=H200 if gpu else None)
    with runnable(), meant_for_h200() if gpu else contextlib.nullcontext():
        over, alone = (bytes_of(_kept_by_experts(settings, n * tokens, each, gate=True)) for each in (mesh, None))
    layers = sum(leaf.shape[0] if len(leaf.shape) == 4 else 1 for path, leaf in shapes(settings).items()
                 if is_routed_expert(path) and path.endswith("/gate_proj"))
    return layers * (over - alone) / devices


@functools.lru_cache(maxsize=4)  # V3 takes seconds to trace
def _kept_and_copies(settings, rows: int, gpu: bool) -> tuple[int, int]:
    """What the whole model keeps of so many rows; and of its weights, whatever the rows: their copies in 8 bits."""
    with runnable(), meant_for_h200() if gpu else contextlib.nullcontext():
        kept, copies = bytes_of(of_model(settings, rows * settings.data.sequence_length)), _copies(settings)
    return kept - (0 if settings.model.remat == "layer" else copies), copies  # a layer computed again makes its own


def _copies(settings) -> int:
    """Bytes of the quantised weights that the forward pass keeps for the backward pass."""
    model = make_model(settings)
    recipe, products = model.products.recipe, model.products
    if not recipe.quantized:
        return 0
    of = functools.lru_cache(maxsize=None)(lambda shape: bytes_of(jax.tree.leaves(jax.eval_shape(
        lambda w: weight(w, recipe.forward.right, products.implementation)[1].packed(),
        jax.ShapeDtypeStruct(shape, jnp.float32)))))
    total = 0
    for path, leaf in shapes(settings).items():
        name = path.removesuffix("/kernel").rsplit("/", 1)[-1]
        if name in config.PROJECTIONS and products.quantizes(name):
            layers, shape = (1, leaf.shape) if path.startswith("mtp_") else (leaf.shape[0], leaf.shape[1:])
            total += layers * of(shape)
    return total


def count(settings) -> dict:
    """Bytes: `weights`; `optimizer`; `kept` and `kept_per_token` of each of the `parts` and the `model`, on an H200.

    `kept_per_token` grows with the tokens; `kept` is what does not, the copies of weights in 8 bits.
    """
    tokens = settings.training.batch_size // settings.training.accumulation_steps * settings.data.sequence_length
    params = variable_shapes(make_model(settings), settings)["params"]
    settings = with_plain_attention(settings)
    with runnable(), meant_for_h200():
        once, twice = ({name: needed_by(leaves) for name, leaves in found.items()} for found in (
            parts(settings, n) | {"model": of_model(settings, n)} for n in (tokens, 2 * tokens)))
    return {
        "weights": bytes_of(jax.tree.leaves(params)),
        "optimizer": bytes_of(jax.tree.leaves(jax.eval_shape(make_optimizer(settings).init, params))),
        "kept": {name: 2 * once[name] - twice[name] for name in once},
        "kept_per_token": {name: (twice[name] - once[name]) / tokens for name in once},
    }


def main() -> None:
    if not _CONFIG.value:
        raise RequestError("--config is missing: python -m research.accounting.memory --config=experiments/FILE.py")
    for name in _RECIPES.value:
        if name not in RECIPES:
            raise RequestError(f"--recipes={name!r} is none of {', '.join(RECIPES)}{nearest(name, RECIPES)}")
    settings = settings_of(_CONFIG.value, _FIELDS.value)
    lines = []
    for name in tqdm(_RECIPES.value, disable=None, leave=False):
        found = count(with_recipe(settings, name))
        parts_of = found["kept_per_token"]
        lines.append(f"{name:<24}{found['weights'] / 2**20:>11,.0f}{found['optimizer'] / 2**20:>11,.0f}"
                     f"{found['kept']['model'] / 2**20:>11,.0f}" + "".join(f"{x:>12,.0f}" for x in parts_of.values()))
    print("MiB of weights, of the optimiser's state, of 8-bit copies of weights; bytes kept of each token for the "
          f"backward pass\n\n{'recipe':<24}{'weights':>11}{'optimiser':>11}{'copies':>11}"
          + "".join(f"{name:>12}" for name in parts_of) + "\n" + "\n".join(lines))


if __name__ == "__main__":
    command.run(main, FLAGS)
