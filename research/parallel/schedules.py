"""Timetables of pipelines: which stage works on which micro-batch when. Plain Python, nothing runs.

A schedule is, for each device, the list of what it does in order; each of these is a tuple of chunks, of which two are
an overlapped pair. When anything happens follows from what it waits for (`timed`). What training runs is `in_step`.
Letters: `P` stages, as in V3 Table 2.
"""

from typing import NamedTuple


class Chunk(NamedTuple):
    """A micro-batch's passage through a stage; batches of each way are counted by themselves."""

    kind: str  # F: forward | B: backward | I, W: its halves, the gradients of the input and of the weights
    batch: int
    way: int = 0  # 1: from the last device to the first (DualPipe), where device d holds stage P - 1 - d too


class Timed(NamedTuple):
    """What a device does from `start` to `end`."""

    start: float
    end: float
    chunks: tuple[Chunk, ...]


class Costs(NamedTuple):
    """Durations: `pair` is of a forward and a backward chunk that overlap."""

    forward: float = 1.0
    backward: float = 2.0
    weights: float = 1.0
    pair: float = 3.0

    def of(self, chunks: tuple[Chunk, ...]) -> float:
        """Of what a device does at once."""
        alone = {"F": self.forward, "B": self.backward, "I": self.backward - self.weights, "W": self.weights}
        return self.pair if len(chunks) > 1 else alone[chunks[0].kind]


COSTS = Costs()


def one_forward_one_backward(P: int, batches: int) -> list[list[tuple[Chunk, ...]]]:
    """1F1B: each stage begins with as many forward chunks as stages follow it, then alternates."""
    return [_alternating(P, batches, stage, "B") for stage in range(P)]


def zero_bubble(P: int, batches: int) -> list[list[tuple[Chunk, ...]]]:
    """ZB1P: as 1F1B, but as many gradients of weights wait for later as stages come before this one."""
    schedule = []
    for stage in range(P):
        order, waiting = [], []
        for (chunk,) in _alternating(P, batches, stage, "I"):
            order.append((chunk,))
            if chunk.kind == "I":
                waiting.append(chunk.batch)
                if len(waiting) > stage:
                    order.append((Chunk("W", waiting.pop(0)),))
        schedule.append(order + [(Chunk("W", batch),) for batch in waiting])
    return schedule


def _alternating(P: int, batches: int, stage: int, backward: str) -> list[tuple[Chunk, ...]]:
    ahead = min(P - stage - 1, batches)
    order = [Chunk("F", batch) for batch in range(ahead)]
    for batch in range(batches - ahead):
        order += [Chunk("F", ahead + batch), Chunk(backward, batch)]
    return [(chunk,) for chunk in order + [Chunk(backward, batch) for batch in range(batches - ahead, batches)]]


def dual(P: int, batches: int) -> list[list[tuple[Chunk, ...]]]:
    """DualPipe (V3 §3.2.1): half of the batches go the other way, and forward chunks overlap with backward ones.

    The order is that of DeepSeek's own implementation (deepseek-ai/DualPipe). ValueError for odd numbers, or less than
    two micro-batches a device.
    """
    if P % 2 or batches % 2 or batches < 2 * P:
        raise ValueError(f"DualPipe needs even numbers and two micro-batches a device, not {batches} on {P} devices")
    return [_both_ways(P, batches, device) for device in range(P)]


def _both_ways(P: int, batches: int, device: int) -> list[tuple[Chunk, ...]]:
    """What a device does under DualPipe: 0 is the way that begins at the end of the pipeline that is nearer."""
    outer = min(device, P - 1 - device)  # devices between this one and the nearer end
    inner = P // 2 - 1 - outer  # and the middle
    order, counts, waiting = [], {}, []

    def chunk(kind: str, way: int = 0) -> Chunk:
        if kind == "W":
            return waiting.pop(0)
        way = way if device < P // 2 else 1 - way
        passage = "F" if kind == "F" else "B", way
        counts[passage] = counts.get(passage, -1) + 1
        if kind == "I":
            waiting.append(Chunk("W", counts[passage], way))
        return Chunk(kind, counts[passage], way)

    def does(*steps: str) -> None:
        """Steps one after another: `F0`, or `F0 B1` for an overlapped pair."""
        order.extend(tuple(chunk(each[0], *map(int, each[1:])) for each in step.split()) for step in steps)

    for _ in range(2 * inner):
        does("F0")
    for _ in range(outer + 1):
        does("F0", "F1")
    for _ in range(inner):
        does("I1", "W", "F1")
    for number in range(batches // 2 - P + outer + 1):
        # the two devices in the middle do not overlap the first pair: that would only keep others waiting
        does(*(("F0", "B1") if inner == number == 0 else ("F0 B1",)), "F1 B0")
    for _ in range(inner):
        does("B1", "F1 B0")
    for number in range(2 * (outer + 1)):  # the second half of these leaves the weights' gradients for later
        does(("B" if number < outer + 1 else "I") + ("1" if number % 2 == 0 else "0"))
    for _ in range(inner):
        does("W", "I0")
    for _ in range(outer + 1):
        does("W")
    return order


def timed(schedule: list[list[tuple[Chunk, ...]]], costs: Costs = COSTS) -> list[list[Timed]]:
    """When each device does what, as early as the order and what it waits for allow; communication takes no time.

    ValueError where nothing can go on.
    """
    P, orders, done = len(schedule), [list(order) for order in schedule], {}
    found = [[] for _ in orders]
    while any(orders):
        moved = False
        for device, order in enumerate(orders):
            while order and all(each in done for chunk in order[0] for each in _needed(chunk, device, P)):
                chunks = order.pop(0)
                start = max([found[device][-1].end if found[device] else 0.0] +
                            [done[each] for chunk in chunks for each in _needed(chunk, device, P)])
                end = start + costs.of(chunks)
                found[device].append(Timed(start, end, chunks))
                done |= {(_passage(chunk), chunk.batch, chunk.way, device): end for chunk in chunks}
                moved = True
        if not moved:
            raise ValueError(f"each device waits for another: {[order[0] for order in orders if order]}")
    return found


def _passage(chunk: Chunk) -> str:
    return "B" if chunk.kind == "I" else chunk.kind


def _needed(chunk: Chunk, device: int, P: int) -> list[tuple]:
    """What must be done before a chunk, as keys of `done`."""
    step = 1 if chunk.way == 0 else -1
    before, behind = device - step, device + step
    if chunk.kind == "F":
        return [("F", chunk.batch, chunk.way, before)] if 0 <= before < P else []
    if chunk.kind == "W":
        return [("B", chunk.batch, chunk.way, device)]
    return [("F", chunk.batch, chunk.way, device)] + (
        [("B", chunk.batch, chunk.way, behind)] if 0 <= behind < P else [])


def idle(timeline: list[list[Timed]], costs: Costs = COSTS) -> float:
    """How much longer the longest device takes than all of its chunks, one by one, would."""
    end = max(device[-1].end for device in timeline)
    return max(end - sum(costs.of((chunk,)) for done in device for chunk in done.chunks) for device in timeline)


def most_held(timeline: list[list[Timed]]) -> int:
    """The most micro-batches that one device has gone forward with and not yet backward."""
    most = 0
    for device in timeline:
        held = 0
        for done in device:
            kinds = [chunk.kind for chunk in done.chunks]
            held += kinds.count("F")
            most = max(most, held)
            held -= sum(kind in "BI" for kind in kinds)
    return most


def in_step_apart(P: int, batches: int) -> tuple[list[list[int | None]], ...]:
    """`in_step` with the backward chunk in its halves: (forward, backward of the input, backward of the weights).

    Stage s's weights wait for s ticks, as in `zero_bubble`. So all stages have those of a micro-batch in one tick, none
    waits for another there, and there are as many such ticks as micro-batches: the idle time is (P - 1)(F + B - W).
    ZB1P's, a W less, takes stages that do different things at a time. Stage s holds what s + 1 micro-batches' gradients
    of weights are made of, beside the inputs of `in_step`.
    """
    forward, backward = in_step(P, batches)
    return forward, backward, [[row[0]] * P for row in backward]


def in_step(P: int, batches: int) -> tuple[list[list[int | None]], list[list[int | None]]]:
    """What training runs: 1F1B in ticks, in each of which a stage goes forward with one micro-batch and then backward
    with another. Returns (forward, backward): [tick][stage] is the micro-batch, or None.

    In one program for all devices each passes on what it has at the end of a tick, and waits for its neighbours there.
    1F1B's own chunks, one a tick, would let each forward chunk wait for a neighbour's backward one. So both are in one
    tick, but for the first P - 1 ticks, in which nothing goes backward, and the last P - 1, in which nothing goes
    forward, and which are as much shorter: the idle time is (P - 1)(F + B), 1F1B's. Each chunk takes what a neighbour
    has passed on in the tick before. Stage s holds the inputs of up to 2(P - s) - 1 micro-batches.
    """
    def begun(first):
        """[tick][stage]: from tick `first(stage)` on a micro-batch a tick."""
        return [[tick - first(stage) if 0 <= tick - first(stage) < batches else None for stage in range(P)]
                for tick in range(batches + 2 * (P - 1))]

    return begun(lambda stage: stage), begun(lambda stage: 2 * (P - 1) - stage)
