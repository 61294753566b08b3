"""Which device holds which experts in inference: those with the largest loads lie on several, so that all are as busy.

Each device of the axis `expert` has as many slots, together more than there are experts (V3 §3.4.1: 8 experts and a
redundant one on each of 32 GPUs). From measured loads `place` says which expert a slot holds, and `slots_of` in which
slots an expert is; a layer turns its tokens' experts into slots, one copy after another by the token's index
(`model.moe.in_turn`), and the exchange (experts.py) knows slots alone. Letters beside the house's: `n` devices,
`S` slots, `C` copies that an expert can have, `I` items.
"""

import numpy as np


def place(loads_E, redundant: int, n: int, nodes: int = 1, groups: int = 1) -> np.ndarray:
    """The expert of each slot, device by device: experts_S, S = E + redundant, as DeepSeek's EPLB places them, but for
    its allowing two of one expert on a device.

    The next copy is of the expert with the largest load a copy, no more of one than there are devices; copies go to
    devices heaviest first, each to the least loaded that has room and, where there is one, none of the same expert.
    Of several `nodes`, of n / nodes devices each, every one gets as many of the gate's `groups`, packed in the same
    way, and places their experts among its own devices: a token reaches no more nodes than it has groups. n divides E
    and redundant, which is at most E * (n / nodes - 1); nodes divides n and groups.
    """
    loads_E = np.asarray(loads_E, np.float64)
    E = loads_E.size
    if nodes > 1:
        experts_GE = np.arange(E).reshape(groups, -1)
        shares = [experts_GE[own].ravel() for own in
                  packed(loads_E.reshape(groups, -1).sum(axis=1), np.arange(groups), nodes)]
        return np.concatenate([own[place(loads_E[own], redundant // nodes, n // nodes)] for own in shares])
    copies_E = np.ones(E, np.int64)
    for _ in range(redundant):
        copies_E[np.argmax(np.where(copies_E < n, loads_E / copies_E, -1))] += 1
    experts_S = np.repeat(np.arange(E), copies_E)
    return experts_S[packed((loads_E / copies_E)[experts_S], experts_S, n).ravel()]


def packed(loads_I, kinds_I, n: int) -> np.ndarray:
    """Which of I items lie in each of n bins, (n, I / n): greedily, see `place`. kinds_I: small whole numbers."""
    room, bins, sums_n = len(loads_I) // n, [[] for _ in range(n)], np.zeros(n)
    full_n, has_nk = np.zeros(n, bool), np.zeros((n, kinds_I.max() + 1), bool)
    for item in np.argsort(-loads_I, kind="stable"):
        best = np.lexsort((sums_n, has_nk[:, kinds_I[item]], full_n))[0]
        bins[best].append(item)
        sums_n[best] += loads_I[item]
        full_n[best], has_nk[best, kinds_I[item]] = len(bins[best]) == room, True
    return np.array(bins)


def slots_of(experts_S, E: int, C: int) -> np.ndarray:
    """The slots of each expert's copies, and -1 where it has fewer than C: slots_EC."""
    slots_EC = np.full((E, C), -1, np.int32)
    for e in range(E):
        own = np.flatnonzero(experts_S == e)
        slots_EC[e, :own.size] = own
    return slots_EC


def fullest(loads_LS, n: int) -> np.ndarray:
    """The load of the fullest of n devices over their mean, by layer; loads_LS: of slots, device by device."""
    loads_Ln = np.reshape(loads_LS, (len(loads_LS), n, -1)).sum(axis=-1)
    return loads_Ln.max(axis=-1) / np.maximum(loads_Ln.mean(axis=-1), 1e-9)
