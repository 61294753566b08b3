"""Where copies of experts lie: by hand, by properties, and beside the best of all placements of a few."""

from itertools import product

import numpy as np
import pytest

from research.parallel.placement import fullest, packed, place, slots_of

LOADS = {
    "zipf": lambda rng, E: rng.permutation(1 / np.arange(1, E + 1)),
    "one expert has nearly all": lambda rng, E: np.where(np.arange(E) == E // 2, 1000, 1),
    "normal logarithms": lambda rng, E: np.exp(rng.normal(size=E)),
    "even": lambda rng, E: np.ones(E),
    "most have none": lambda rng, E: 7 * (np.arange(E) % 5 == 1),
    "none": lambda rng, E: np.zeros(E),
}
SHAPES = (  # E, redundant, devices, nodes, groups; V3's prefill is the last
    (8, 8, 8, 1, 1), (16, 4, 4, 1, 1), (16, 48, 4, 1, 1), (16, 8, 8, 2, 4), (24, 24, 6, 3, 3), (12, 6, 6, 3, 6),
    (256, 32, 32, 1, 8), (256, 32, 32, 4, 8))


def loads_of_devices(loads_E, experts_S, n: int):
    """What each of n devices has to do, (n,), where copies share evenly."""
    return (loads_E / np.bincount(experts_S))[experts_S].reshape(n, -1).sum(axis=1)


@pytest.mark.parametrize("kind", LOADS)
@pytest.mark.parametrize("E, redundant, n, nodes, groups", SHAPES)
def test_each_expert_has_a_slot_and_no_device_the_same_twice(kind, E, redundant, n, nodes, groups):
    """And none is fuller than the fullest where experts lie in their order, without copies."""
    loads_E = LOADS[kind](np.random.default_rng(E + redundant), E)
    experts_S = place(loads_E, redundant, n, nodes, groups)
    assert experts_S.shape == (E + redundant,) and set(experts_S) == set(range(E))
    assert all(len(set(own)) == own.size for own in experts_S.reshape(n, -1))
    for own in experts_S.reshape(nodes, -1):  # whole groups, as many on each node
        assert len(set(own)) == E // nodes and len(set(own // (E // groups))) == groups // nodes or nodes == 1
    assert max(loads_of_devices(loads_E, experts_S, n)) <= loads_E.reshape(n, -1).sum(axis=1).max() + 1e-9


def test_the_heaviest_is_copied_first():
    """By hand: 9 twice, since a half of it is still above 4, and then the first 4; devices get 4 and 4, three thirds of
    9, two halves of 4 (the second not where the first is), 2 and 1. No third copy of anything for two devices."""
    np.testing.assert_array_equal(place([9, 4, 2, 1, 4, 4], 3, 3).reshape(3, 3), [[4, 0, 1], [5, 0, 3], [0, 1, 2]])
    np.testing.assert_array_equal(np.bincount(place([9, 1, 1, 1], 2, 2)), [2, 2, 1, 1])


def test_groups_stay_on_a_node():
    """By hand: the groups' 12 and 2 make 14, 8 and 6 too; a node copies its own heaviest, 11 and a 1, 5 and a 4."""
    experts_S = place([11, 1, 4, 4, 1, 5, 1, 1], 4, 4, nodes=2, groups=4)
    assert [sorted(set(own)) for own in experts_S.reshape(2, -1)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    np.testing.assert_array_equal(np.bincount(experts_S), [2, 2, 2, 1, 1, 2, 1, 1])


@pytest.mark.parametrize("seed", range(20))
def test_a_few_experts_are_placed_nearly_as_well_as_can_be(seed):
    """Beside all ways to give 4 experts, each one slot at least, the 6 slots of two devices."""
    loads_E = np.exp(np.random.default_rng(seed).normal(size=4))
    best = min(max(loads_of_devices(loads_E, np.array(way), 2))
               for way in product(range(4), repeat=6) if len(set(way)) == 4)
    found = max(loads_of_devices(loads_E, place(loads_E, 2, 2), 2))
    assert best - 1e-9 <= found <= 4 / 3 * best  # 1.07 on average, 1.2 at most


def test_what_is_packed_lies_apart_where_there_is_room():
    np.testing.assert_array_equal(packed(np.array([5.0, 3, 3, 1]), np.array([0, 1, 1, 2]), 2), [[0, 2], [1, 3]])
    np.testing.assert_array_equal(packed(np.array([1.0, 1, 1, 1]), np.array([0, 0, 0, 1]), 2), [[0, 2], [1, 3]])


def test_slots_and_the_fullest_device_by_hand():
    np.testing.assert_array_equal(slots_of(np.array([2, 0, 1, 2]), 3, 2), [[1, -1], [2, -1], [0, 3]])
    np.testing.assert_allclose(fullest([[1, 3, 2, 2], [5, 1, 0, 0]], 2), [1, 2])
