"""What goes from node to node, against counting."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from research.accounting import exchange
from research.accounting.request import settings_of


def gate(**fields):
    return SimpleNamespace(**{"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3,
                              "topk_method": "noaux_tc"} | fields)


@pytest.mark.parametrize("fields", [{}, {"n_group": 2, "num_experts_per_tok": 6}, {"n_group": 12}])
def test_without_a_limit_nodes_are_those_of_all_choices(fields):
    """Of any experts, for the tokens of each node. A limit that is none gives the same, but for what is drawn."""
    config = gate(**fields, topk_group=fields.get("n_group", 4))
    E, K, G = config.n_routed_experts, config.num_experts_per_tok, config.n_group
    reached = [len({expert * G // E for expert in chosen} - {own})
               for chosen in itertools.combinations(range(E), K) for own in range(G)]
    found = exchange.other_nodes(config)
    assert found["free"] == {"most": max(reached), "mean": pytest.approx(np.mean(reached), rel=1e-12)}
    assert found["limited"] == {"most": max(reached), "mean": pytest.approx(np.mean(reached), abs=0.03)}


def test_a_limit_that_leaves_no_choice_of_experts():
    """Two groups of three experts, all of which a token takes."""
    assert exchange.other_nodes(gate(num_experts_per_tok=6))["limited"] == {"most": 2, "mean": pytest.approx(1.5)}


def test_other_gates_have_no_nodes():
    for other in ({"n_routed_experts": 0}, {"n_group": 1}, {"topk_method": "greedy"},
                  {"topk_method": "group_limited_greedy"}):
        assert exchange.account(gate(**other)) == {}


def test_v3_sends_a_token_to_four_nodes_where_it_could_be_seven():
    """By hand: 7168 x (1 + 4/128 bytes there, 2 back), twice, 58 layers; with its own of 8, 3.96 nodes (counted of
    drawn affinities by NumPy), or 8 (1 - C(224, 8) / C(256, 8))."""
    found = exchange.account(settings_of("experiments/deepseek_v3.py", []).model)
    nodes, size = found["nodes"], found["bytes"]
    assert (nodes["limited"]["most"], nodes["free"]["most"]) == (4, 7)
    assert size["limited"]["most"] == 58 * 4 * 2 * 7168 * 3.03125
    assert nodes["limited"]["mean"] == pytest.approx(3.963 * 7 / 8, abs=5e-3)
    assert nodes["free"]["mean"] == pytest.approx(5.294 * 7 / 8, abs=1e-3)
    assert size["free"]["mean"] / size["limited"]["most"] == pytest.approx(nodes["free"]["mean"] / 4)


@pytest.mark.parametrize("fields, there", [
    ([], 2 * 7168), (["precision.recipe=fp8_dispatched"], 7168 + 56),  # a byte for the scale of 128
    (["precision.recipe=float32"], 4 * 7168),
    (["precision.recipe=fp8_dispatched", "precision.high_precision=gate_proj,up_proj,down_proj"], 2 * 7168)])
def test_a_mesh_sends_what_its_recipe_has(fields, there):
    """There, and back as activations are; as much for the gradients; 58 layers."""
    back = 4 * 7168 if "precision.recipe=float32" in fields else 2 * 7168
    found = [exchange.of_mesh(settings_of("experiments/deepseek_v3.py", [*fields, f"mesh.expert={n}"]))
             for n in (1, 4, 64)]
    assert found == [{}] + [{"devices": n, "bytes": 58 * n * 2 * (there + back)} for n in (4, 8)]
