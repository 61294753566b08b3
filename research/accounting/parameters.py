"""How many parameters a model has and how many a token uses, by shape evaluation: nothing is allocated."""

import re

from research.model.build import make_model, variable_shapes
from research.tree import paths

PARTS = (  # part and the paths that belong to it; the first that matches
    ("embedding", r"^embed_tokens$"),
    ("head", r"^lm_head$"),
    ("norms", r"norm/scale$"),  # those of latents too
    ("attention", r"/attention/"),
    ("router", r"/mlp/gate/"),
    ("routed experts", r"/mlp/(gate|up|down)_proj$"),
    ("shared experts", r"/shared_experts/"),
    ("dense feed-forward", r"/mlp/"),
)


def shapes(settings) -> dict:
    """{`path`: ShapeDtypeStruct} of every parameter of the settings' model, which are the same under every recipe."""
    return paths(variable_shapes(make_model(settings), settings)["params"])


def count(settings) -> dict:
    """`total` parameters without the multi-token modules, `mtp` those modules' own, `by_part` those of the total, and
    the `active` ones of one token.

    Biases of the router count as the checkpoints count them, with the parameters. Active: embedding and head included;
    `active_without_embedding` leaves the input embedding out, `active_without_both` the head too.
    """
    m = settings.model
    sizes = {path: leaf.size for path, leaf in shapes(settings).items()}
    main = {path: size for path, size in sizes.items() if not path.startswith("mtp_")}
    biases = m.n_routed_experts if m.topk_method == "noaux_tc" else 0
    parts = dict.fromkeys((name for name, _ in PARTS), 0)
    for path, size in main.items():
        parts[next(name for name, pattern in PARTS if re.search(pattern, path))] += size
    parts["router"] += max(m.num_hidden_layers - m.first_k_dense_replace, 0) * biases
    total, experts = sum(parts.values()), parts["routed experts"]
    idle = experts * (m.n_routed_experts - m.num_experts_per_tok) // m.n_routed_experts if experts else 0
    return {
        "total": total,
        "active": total - idle,
        "active_without_embedding": total - idle - parts["embedding"],
        "active_without_both": total - idle - parts["embedding"] - parts["head"],
        "by_part": {name: size for name, size in parts.items() if size},
        "mtp": sum(sizes.values()) - sum(main.values()) + settings.mtp.num_nextn_predict_layers * biases,
    }


def is_routed_expert(path: str) -> bool:
    """Whether a parameter's path is that of routed experts, a multi-token module's too."""
    return re.search(dict(PARTS)["routed experts"], path) is not None
