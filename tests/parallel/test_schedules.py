"""Timetables: everything is done once and in order, and the idle time and what is held are V3 Table 2's."""

import collections

import pytest

from research.parallel import schedules
from research.parallel.schedules import Chunk, Timed, idle, most_held, timed
from research.tables.v3_bubbles import SCHEDULES

SIZES = ((2, 4), (4, 8), (6, 14), (8, 20))  # stages and micro-batches; 8 and 20 are V3's Figure 5
ONE_WAY = ((1, 3), (3, 2), (5, 11))


@pytest.mark.parametrize("name, P, batches", [(name, *size) for name in SCHEDULES for size in SIZES] +
                         [(name, *size) for name in ("1F1B", "ZB1P") for size in ONE_WAY])
def test_every_micro_batch_goes_forward_and_backward_once_through_each_stage(name, P, batches):
    """Of each way; what is told apart (the input's gradient, the weights') adds up to the backward chunk."""
    ways = 2 if name == "DualPipe" else 1
    for device in SCHEDULES[name][0](P, batches):
        done = collections.Counter(chunk for chunks in device for chunk in chunks)
        assert set(done.values()) == {1}
        for way in range(ways):
            kinds = [{chunk.kind for chunk in done if (chunk.batch, chunk.way) == (batch, way)}
                     for batch in range(batches // ways)]
            assert all(of in ({"F", "B"}, {"F", "I", "W"}) for of in kinds)
        assert len({(chunk.batch, chunk.way) for chunk in done}) == batches


@pytest.mark.parametrize("name, P, batches", [(name, *size) for name in SCHEDULES for size in SIZES])
def test_nothing_begins_before_what_it_needs(name, P, batches):
    """Stated anew: the forward chunk of the stage before, the backward one of the stage behind, one's own forward."""
    timeline = timed(SCHEDULES[name][0](P, batches))
    start, end = {}, {}
    for device, its in enumerate(timeline):
        assert all(one.end <= other.start for one, other in zip(its, its[1:], strict=False))
        for done in its:
            for chunk in done.chunks:
                stage = device if chunk.way == 0 else P - 1 - device
                key = chunk.kind.replace("I", "B"), chunk.batch, chunk.way, stage
                start[key], end[key] = done.start, done.end
    for (kind, batch, way, stage), begun in start.items():
        if kind == "F" and stage:
            assert begun >= end["F", batch, way, stage - 1]
        elif kind == "W":
            assert begun >= end["B", batch, way, stage]
        elif kind == "B":
            assert begun >= end["F", batch, way, stage]
            assert stage == P - 1 or begun >= end["B", batch, way, stage + 1]


@pytest.mark.parametrize("name, P, batches", [(name, *size) for name in SCHEDULES for size in SIZES] +
                         [("1F1B", 1, 3), ("1F1B", 5, 11), ("ZB1P", 5, 11)])
def test_idle_time_and_micro_batches_held_are_those_of_the_table(name, P, batches):
    schedule, bubble, held = SCHEDULES[name]
    timeline = timed(schedule(P, batches))
    assert idle(timeline) == bubble(P) and most_held(timeline) == held(P)


def test_by_hand():
    """Two stages, two micro-batches of 1F1B."""
    F, B = (lambda batch: (Chunk("F", batch),)), (lambda batch: (Chunk("B", batch),))
    assert timed(schedules.one_forward_one_backward(2, 2)) == [
        [Timed(0, 1, F(0)), Timed(1, 2, F(1)), Timed(4, 6, B(0)), Timed(7, 9, B(1))],
        [Timed(1, 2, F(0)), Timed(2, 4, B(0)), Timed(4, 5, F(1)), Timed(5, 7, B(1))]]


def test_a_schedule_that_cannot_go_on_is_an_error():
    with pytest.raises(ValueError, match="each device waits for another"):
        timed([[(Chunk("B", 0),), (Chunk("F", 0),)]])


@pytest.mark.parametrize("P, batches", [(3, 8), (4, 9), (4, 6)])
def test_dual_pipe_needs_even_numbers_and_enough_micro_batches(P, batches):
    with pytest.raises(ValueError, match="needs even numbers and two micro-batches a device"):
        schedules.dual(P, batches)


@pytest.mark.parametrize("P, batches", [(1, 1), (2, 2), (2, 5), (4, 4), (4, 9)])
def test_what_training_runs_is_in_step(P, batches):
    """Each chunk comes one tick after the neighbour's that it waits for, so that nothing that comes has to wait; the
    ticks are together as long as 1F1B, with the gradients of weights apart by (P - 1) W less; a stage holds the inputs
    of 2 (P - s) - 1 micro-batches, and no more."""
    forward, backward = schedules.in_step(P, batches)
    assert len(forward) == len(backward) == batches + 2 * (P - 1)
    at = [{(stage, batch): tick for tick, row in enumerate(table) for stage, batch in enumerate(row)
           if batch is not None} for table in (forward, backward)]
    assert at[0].keys() == at[1].keys() == {(stage, batch) for stage in range(P) for batch in range(batches)}
    assert sum(batch is not None for table in (forward, backward) for row in table for batch in row) == 2 * P * batches
    for stage, batch in at[0]:
        assert stage == 0 or at[0][stage, batch] == at[0][stage - 1, batch] + 1
        assert stage == P - 1 or at[1][stage, batch] == at[1][stage + 1, batch] + 1
        assert at[1][stage, batch] >= at[0][stage, batch]  # within a tick forward comes first
    F, B, W, _ = schedules.COSTS
    ticks = [sum(any(batch is not None for batch in row) for row in table)
             for table in schedules.in_step_apart(P, batches)]
    if batches >= P:
        one, two = (batches * (F + B) + SCHEDULES[name][1](P) for name in ("1F1B", "ZB1P"))
        assert F * ticks[0] + B * ticks[1] == one
        assert F * ticks[0] + (B - W) * ticks[1] + W * ticks[2] == (one + two) / 2
    halves = schedules.in_step_apart(P, batches)
    assert halves[:2] == (forward, backward)
    weights = {batch: tick for tick, row in enumerate(halves[2]) for batch in row if batch is not None}
    assert [set(row) - {None} for row in halves[2] if set(row) != {None}] == [{batch} for batch in range(batches)]
    for stage, batch in at[1]:  # of all stages in one tick, in which the last of them has gone backward
        assert weights[batch] == at[1][0, batch] == at[1][stage, batch] + stage
    for stage in range(P):
        held = [sum(at[0][stage, batch] <= tick <= at[1][stage, batch] for batch in range(batches))
                for tick in range(len(forward))]
        assert max(held) == min(batches, 2 * (P - stage) - 1)
