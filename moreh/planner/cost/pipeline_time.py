"""How long one step of a pipeline takes: a simulation of the exact order of operations."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moreh.planner.plan.arrays import Floats
from moreh.planner.plan.plan import Schedule
from moreh.planner.plan.schedules import (
    B,
    F,
    I,
    Order,
    W,
    micro_batches_per_round,
    order,
    peak_in_flight,
    stages_of_ranks,
)

# Increments that agree to this share of the makespan are those of a steady state.
STEADY_TOLERANCE = 1e-12
# A step this many times as long as the pipeline is deep is simulated in the hope of a steady state.
SAMPLE_DEPTHS = 9


@dataclass(frozen=True, eq=False)
class Timeline:
    """What each rank did and when. The arrays after `busy_s` ([ranks]) have one entry an operation, [operations].

    `kind` counts in `moreh.planner.plan.schedules.KINDS`. The entries are sorted by rank and, within a rank, by time.
    """

    makespan_s: float
    busy_s: Floats
    rank: NDArray[np.int32]
    kind: NDArray[np.int32]
    stage: NDArray[np.int32]
    micro_batch: NDArray[np.int32]
    start_s: Floats
    end_s: Floats


class Linked(NamedTuple):
    """An order ready for simulation: operations of all ranks such that each comes after all that it waits for.

    `source` is the place in this sequence of the operation on another rank that sends the input; operations without one
    point to the end of the sequence. `duration` is kind * stages + stage.
    """

    source: "array[int]"
    rank: "array[int]"
    duration: "array[int]"
    # Where each operation of the order (rank after rank) is in this sequence.
    place: NDArray[np.int32]


def link(rows: Order, schedule: Schedule, chunks: int) -> Linked:
    """Put the operations of all ranks into one sequence in which each follows its inputs; linear in their number.

    Raises:
        AssertionError: the ranks would wait for each other for ever, or an operation comes before its own input: a defect.
    """
    ranks, length = rows.kind.shape
    stages = ranks * chunks
    micro_batches = int(rows.micro_batch.max()) + 1
    rank_of = np.empty(stages, dtype=np.int64)
    rank_of[stages_of_ranks(schedule, ranks, chunks)] = np.arange(ranks)[:, None]
    kind, stage, micro_batch = (part.astype(np.int64) for part in rows)
    # What an operation makes and what it needs: 0 an activation, 1 the gradient of one, 2 the gradient of weights.
    made = np.where(kind == F, 0, np.where(kind == W, 2, 1))
    needed_stage = np.where(kind == F, stage - 1, np.where((kind == W) | (stage == stages - 1), stage, stage + 1))
    needed_made = np.where((kind == F) | ((kind != W) & (stage == stages - 1)), 0, 1)
    makes = (made * stages + stage) * micro_batches + micro_batch
    needs = (needed_made * stages + needed_stage) * micro_batches + micro_batch
    # The last entry stands for the input of the first stage, which is there from the start.
    there = 3 * stages * micro_batches
    first = (kind == F) & (stage == 0)
    needs[first] = there
    remote = ~first & (rank_of[np.maximum(needed_stage, 0)] != np.arange(ranks)[:, None])
    # A backward also needs the activation of its own stage.
    own = np.where((kind == B) | (kind == I), stage * micro_batches + micro_batch, there)

    total = ranks * length
    ready = bytearray(there + 1)
    ready[there] = 1
    sequence: list[int] = []
    done = [0] * ranks
    rows_of_ranks = list(zip(makes.tolist(), needs.tolist(), own.tolist(), strict=True))
    while len(sequence) < total:
        before = len(sequence)
        for rank, (make, need, mine) in enumerate(rows_of_ranks):
            start = at = done[rank]
            while at < length and ready[need[at]] and ready[mine[at]]:
                ready[make[at]] = 1
                at += 1
            sequence.extend(range(rank * length + start, rank * length + at))
            done[rank] = at
        if len(sequence) == before:
            stuck = next(rank for rank in range(ranks) if done[rank] < length)
            raise AssertionError(f"deadlock: the pipeline's order stops at operation {done[stuck]} of rank {stuck}")
    flat = np.asarray(sequence, dtype=np.int64)
    place = np.empty(total, dtype=np.int32)
    place[flat] = np.arange(total, dtype=np.int32)
    maker = np.full(there + 1, total, dtype=np.int32)
    maker[makes.reshape(-1)] = place
    source = np.where(remote, maker[needs], total).astype(np.int32)
    return Linked(
        array("i", source.reshape(-1)[flat].tobytes()),
        array("i", (flat // length).astype(np.int32).tobytes()),
        array("i", (kind * stages + stage).reshape(-1)[flat].astype(np.int32).tobytes()),
        place,
    )


@lru_cache(maxsize=64)
def _linked(schedule: Schedule, ranks: int, micro_batches: int, chunks: int) -> Linked:
    return link(order(schedule, ranks, micro_batches, chunks), schedule, chunks)


def _ends(linked: Linked, ranks: int, durations: list[float], send_s: float) -> list[float]:
    """When each operation of the sequence ends, and one entry more: -inf, the input that is there from the start."""
    ends = [0.0] * len(linked.source)
    ends.append(-inf)
    free = [0.0] * ranks
    for place, (source, rank, duration) in enumerate(zip(linked.source, linked.rank, linked.duration, strict=True)):
        start = ends[source] + send_s
        busy_until = free[rank]
        if busy_until > start:
            start = busy_until
        ends[place] = free[rank] = start + durations[duration]
    return ends


def _durations(
    schedule: Schedule,
    ranks: int,
    chunks: int,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    weight_fraction: float,
) -> list[float]:
    """Seconds by kind * stages + stage."""
    stages = ranks * chunks
    if len(forward_s) != stages or len(backward_s) != stages:
        raise ValueError(
            f"{stages} stages need as many times, but got {len(forward_s)} forward and {len(backward_s)} backward."
        )
    # The arithmetic of the loop is much slower with numpy's scalars.
    forward, backward = [float(time) for time in forward_s], [float(time) for time in backward_s]
    weight = [time * weight_fraction for time in backward]
    return [*forward, *backward, *(full - part for full, part in zip(backward, weight, strict=True)), *weight]


def simulate(
    schedule: Schedule,
    ranks: int,
    micro_batches: int,
    chunks: int,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    weight_fraction: float,
    send_s: float,
) -> Timeline:
    """Run every operation in the order of its rank, as soon as the rank is free and the input has arrived.

    Args:
        forward_s: Seconds of one micro-batch through each stage, [ranks * chunks].
        backward_s: Seconds of the full backward of each stage, [ranks * chunks].
        weight_fraction: Share of `backward_s` that the gradient of the weights takes, where the schedule splits the backward.
        send_s: Seconds from the end of an operation to the arrival of its result at another rank. The sender computes on.

    Without check of what torch refuses: other programs run 1F1B with fewer micro-batches than ranks.
    """
    rows = order(schedule, ranks, micro_batches, chunks)
    durations = _durations(schedule, ranks, chunks, forward_s, backward_s, weight_fraction)
    linked = _linked(schedule, ranks, micro_batches, chunks)
    ends = np.array(_ends(linked, ranks, durations, send_s))
    arrivals = ends[np.asarray(linked.source)] + send_s
    duration = np.array(durations)[np.asarray(linked.duration)]
    shape = rows.kind.shape
    end = ends[linked.place].reshape(shape)
    free = np.concatenate([np.zeros((ranks, 1)), end[:, :-1]], axis=1)
    return Timeline(
        makespan_s=float(end.max()),
        busy_s=duration[linked.place].reshape(shape).sum(axis=1),
        rank=np.repeat(np.arange(ranks, dtype=np.int32), shape[1]),
        kind=rows.kind.reshape(-1),
        stage=rows.stage.reshape(-1),
        micro_batch=rows.micro_batch.reshape(-1),
        start_s=np.maximum(free, arrivals[linked.place].reshape(shape)).reshape(-1),
        end_s=end.reshape(-1),
    )


def makespan(
    schedule: Schedule,
    ranks: int,
    micro_batches: int,
    chunks: int,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    weight_fraction: float,
    send_s: float,
) -> float:
    """Seconds of one step: `simulate(...).makespan_s`, faster; with many micro-batches it may differ by rounding.

    The arguments are those of `simulate`.
    """
    durations = _durations(schedule, ranks, chunks, forward_s, backward_s, weight_fraction)

    def ends(rounds: int) -> tuple[Linked, list[float]]:
        linked = _linked(schedule, ranks, rounds * per_round, chunks)
        return linked, _ends(linked, ranks, durations, send_s)

    per_round = int(micro_batches_per_round(schedule, ranks, np.asarray(micro_batches), chunks))
    rounds = micro_batches // per_round
    depth = 1 - int(-peak_in_flight(schedule, ranks, micro_batches, chunks).max() // (chunks * per_round))
    sample = SAMPLE_DEPTHS * depth
    if rounds >= 2 * sample:
        linked, sampled = ends(sample)
        steady = _steady_state(linked, np.array(sampled), ranks, sample, depth)
        if steady:
            period, seconds = steady
            skipped = (rounds - sample) // period
            rest = rounds - skipped * period
            return max(sampled if rest == sample else ends(rest)[1]) + skipped * seconds
    return max(ends(rounds)[1])


def _steady_state(linked: Linked, ends: Floats, ranks: int, rounds: int, depth: int) -> tuple[int, float] | None:
    """The period, in rounds, and its seconds, if all ranks repeat exactly the same before the pipeline starts to drain.

    An operation waits only for operations that are less than `depth` rounds before. If all operations of `depth` rounds
    came the same time after those one period before, so do all that follow, up to the drain.
    """
    end, code = ends[linked.place].reshape(ranks, -1), np.asarray(linked.duration)[linked.place].reshape(ranks, -1)
    length = end.shape[1] // rounds
    # In a longer step the order of the operations in the last rounds, and what they wait for, would be another.
    stop = (rounds - 2 * depth - 1) * length
    begin = stop - depth * length
    tolerance = STEADY_TOLERANCE * float(end.max())
    for period in range(1, depth + 1):
        shift = period * length
        gained = end[:, begin:stop] - end[:, begin - shift : stop - shift]
        least, most = float(gained.min()), float(gained.max())
        if most - least <= tolerance and np.array_equal(code[:, begin:stop], code[:, begin - shift : stop - shift]):
            return period, (least + most) / 2
    return None
