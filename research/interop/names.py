"""Which Hugging Face tensors make up each of our arrays: one table, read in either direction.

Theirs are one tensor a layer and expert, `weight` of (out, in); ours are stacked over layers (and experts) and of
(in, out). `mtp_k` is stored as one more layer, with copies of the embedding and the head.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from research.config import PROJECTIONS

LEAVES = {"kernel": "weight", "scale": "weight"}  # the others keep their name
MODULES = {"attention": "self_attn"}
STACKS = ("gate_proj", "up_proj", "down_proj")  # the routed experts, where they are leaves
TOP = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight", "norm/scale": "model.norm.weight"}


SCALE = "_scale_inv"  # a weight in FP8 blocks has its scales under its own name and this ending
IN_BLOCKS = tuple(name for name in PROJECTIONS if name != "eh_proj")  # what the release quantises


class Place(NamedTuple):
    """One tensor of theirs: its name, which slice of our array it is, and whether it lies there transposed."""

    name: str
    index: tuple[int, ...]
    transposed: bool


def places(path: str, shape: tuple[int, ...], config) -> Iterator[Place]:
    """The tensors that make up our array at `path` (`layers/attention/q_proj/kernel`), in order of its slices.

    config: the settings' `model`.
    """
    if path in TOP:
        yield Place(TOP[path], (), path == "lm_head")
        return
    group, *modules, leaf = path.split("/")
    if group.startswith("mtp_"):
        layers = [mtp_layer(int(group.removeprefix("mtp_")), config)]
        if modules[0] == "block":
            modules = modules[1:]
        elif modules[0] == "norm":
            modules = ["shared_head", "norm"]
    else:
        first = config.first_k_dense_replace if group == "layers" else 0
        layers = range(first, first + shape[0])
    stacked = leaf in STACKS
    inner = ".".join(MODULES.get(module, module) for module in modules)
    for (i, layer), expert in itertools.product(
            enumerate(layers), range(config.n_routed_experts) if stacked else (None,)):
        index = () if group.startswith("mtp_") else (i,)
        if stacked:
            yield Place(f"model.layers.{layer}.{inner}.experts.{expert}.{leaf}.weight", (*index, expert), True)
        else:
            name = ".".join(filter(None, (f"model.layers.{layer}", inner, LEAVES.get(leaf, leaf))))
            yield Place(name, index, leaf == "kernel")


def in_blocks(path: str) -> bool:
    """Whether the release holds our array at `path` in FP8 blocks: its projections, but neither gate nor eh_proj."""
    *modules, leaf = path.split("/")
    return leaf in STACKS or (leaf == "kernel" and modules[-1] in IN_BLOCKS)


def scales_path(path: str) -> str:
    """Where our checkpoints hold the scales of an array that they hold in FP8 blocks."""
    return "scales/" + path.split("/", 1)[1]


def mtp_layer(depth: int, config) -> int:
    """The number under which the multi-token module of a depth (from 1) is stored."""
    return config.num_hidden_layers + depth - 1


def repeats(settings) -> dict[str, list[str]]:
    """{original: its copies}; see `copies`."""
    table: dict[str, list[str]] = {}
    for copy, original in copies(settings).items():
        table.setdefault(original, []).append(copy)
    return table


def copies(settings) -> dict[str, str]:
    """{copy: original} of the tensors that repeat another one, as the release's multi-token layers do."""
    head = TOP["embed_tokens" if settings.model.tie_word_embeddings else "lm_head"]
    table = {}
    for depth in range(1, settings.mtp.num_nextn_predict_layers + 1):
        prefix = f"model.layers.{mtp_layer(depth, settings.model)}"
        table[f"{prefix}.embed_tokens.weight"] = TOP["embed_tokens"]
        table[f"{prefix}.shared_head.head.weight"] = head
    return table
