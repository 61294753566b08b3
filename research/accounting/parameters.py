"""How many parameters a model has and how many a token uses, by shape evaluation: nothing is allocated."""

from research.model.build import make_model, variable_shapes
from research.tree import paths


def shapes(settings) -> dict:
    """{`path`: ShapeDtypeStruct} of every parameter of the settings' model."""
    return paths(variable_shapes(make_model(settings), settings)["params"])


def count(settings) -> dict:
    """`total` parameters without the multi-token modules, those modules' own, and the `active` ones of one token.

    Biases of the router count as the checkpoints count them, with the parameters. Active: embedding and head included;
    `active_without_embedding` leaves the input embedding out, `active_without_both` the head too.
    """
    m = settings.model
    sizes = {path: leaf.size for path, leaf in shapes(settings).items()}
    main = {path: size for path, size in sizes.items() if not path.startswith("mtp_")}
    routers = max(m.num_hidden_layers - m.first_k_dense_replace, 0) * m.n_routed_experts
    biases = routers if m.topk_method == "noaux_tc" else 0
    total = sum(main.values()) + biases
    experts = sum(size for path, size in main.items() if is_routed_expert(path))
    idle = experts * (m.n_routed_experts - m.num_experts_per_tok) // m.n_routed_experts if experts else 0
    embedding, head = main["embed_tokens"], main.get("lm_head", 0)
    return {
        "total": total,
        "mtp": sum(sizes.values()) - sum(main.values()),
        "active": total - idle,
        "active_without_embedding": total - idle - embedding,
        "active_without_both": total - idle - embedding - head,
    }


def is_routed_expert(path: str) -> bool:
    """Whether a parameter's path is that of routed experts."""
    return path.endswith(("/mlp/gate_proj", "/mlp/up_proj", "/mlp/down_proj"))
