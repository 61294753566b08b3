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


@pytest.mark.parametrize("fields", [{}, {"n_group": 6}, {"n_group": 2, "num_experts_per_tok": 8}, {"n_group": 12}])
def test_the_mean_is_that_of_all_choices(fields):
    config = gate(**fields)
    size = config.n_routed_experts // config.n_group
    reached = [len({expert // size for expert in chosen})
               for chosen in itertools.combinations(range(config.n_routed_experts), config.num_experts_per_tok)]
    found = exchange.nodes_a_token(config)["without_limit"]
    assert found["most"] == max(reached) and found["mean"] == pytest.approx(np.mean(reached), rel=1e-12)


def test_the_most_is_the_limit_or_what_a_token_can_choose():
    assert exchange.nodes_a_token(gate())["most"] == 2
    assert exchange.nodes_a_token(gate(topk_group=4))["most"] == 3
    for other in ({"n_routed_experts": 0}, {"n_group": 1}, {"topk_method": "greedy"},
                  {"topk_method": "group_limited_greedy"}):
        assert exchange.account(gate(**other)) == {}


def test_v3_sends_a_token_to_four_nodes_where_it_could_be_eight():
    """By hand: 7168 x (1 + 4/128 bytes there, 2 back), twice, 58 layers; 8 (1 - C(224, 8) / C(256, 8)) nodes."""
    found = exchange.account(settings_of("experiments/deepseek_v3.py", []).model)
    assert found["nodes"]["most"] == 4 and found["nodes"]["without_limit"]["most"] == 8
    assert found["bytes"] == 58 * 4 * 2 * 7168 * 3.03125 == found["bytes_without_limit"]["most"] / 2
    assert found["nodes"]["without_limit"]["mean"] == pytest.approx(5.294, abs=1e-3)


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
