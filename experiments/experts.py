"""How many experts, how fine, and how many of them shared (DeepSeekMoE, 2401.06066, Table 1, §4.4-4.5).

Question: at equal parameters and equal active ones, do finer experts and a shared one lower the held-out loss, and does
a trained model miss its experts more when they are masked or fewer of them are chosen?
Command, for each arm and seed, or all of them with their table:
    python -m research.main --config=experiments/experts.py:micro:fine_4 --workdir=runs/experts/fine_4-0
    python -m research.tables --table=moe_architecture --scale=cpu
An expert of full width is two of nano's. All arms are balanced as V3 is, where the paper has a loss of experts.
Cost: up to 3 times mtp.py's, not measured. Result: results/moe_architecture.md (micro; larger not yet run).
"""

from experiments import base, nano


def mixture(width: int, shared: int, routed: int, chosen: int) -> dict:
    """`shared` experts that every token takes, and `chosen` of `routed` ones."""
    return {"model.moe_intermediate_size": width, "model.n_shared_experts": shared, "model.n_routed_experts": routed,
            "model.num_experts_per_tok": chosen}


def get_config(arms: str = ""):
    c, arms = nano.sized(arms)
    W = 2 * c.model.moe_intermediate_size
    return base.select(c, arms, {
        "dense": {"model.n_routed_experts": 0, "model.intermediate_size": W},
        "top_1": mixture(W, 0, 16, 1),  # Switch
        "top_2": mixture(W, 0, 16, 2),  # GShard
        "top_2_wide": mixture(3 * W // 2, 0, 16, 2),  # GShard x1.5
        "shared": mixture(W, 1, 15, 1),
        "fine_2": mixture(W // 2, 1, 31, 3),
        "fine_4": mixture(W // 4, 1, 63, 7),  # DeepSeekMoE
        "fine_4_unshared": mixture(W // 4, 0, 64, 8),
        "shared_2": mixture(W // 4, 2, 62, 6),
        "shared_4": mixture(W // 4, 4, 60, 4),
        "half": mixture(W // 4, 1, 63, 3),
        # in the table these are fine_4's own weights, nothing trained (§4.5)
        "fine_4_disabled": mixture(W // 4, 0, 63, 8),
        "fine_4_active_4": mixture(W // 4, 1, 63, 4),
        "fine_4_active_5": mixture(W // 4, 1, 63, 5),
        "fine_4_active_6": mixture(W // 4, 1, 63, 6),
    })
