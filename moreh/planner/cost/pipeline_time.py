"""The time of one pipeline step, by simulating the exact order of operations.

`simulate` gives the times of all operations, for pictures and tests. `makespan` gives the step time only and is what
the search calls: it extrapolates long steps from a steady state.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moreh.planner.plan.arrays import FloatArray
from moreh.planner.plan.plan import Schedule
from moreh.planner.plan.schedules import (
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    FULL_BACKWARD,
    OperationTable,
    micro_batches_per_round,
    operation_table,
    peak_in_flight,
)
from moreh.planner.plan.stage_layout import stage_to_rank

# Increments that agree to within this share of the makespan are those of a steady state.
STEADY_TOLERANCE = 1e-12
# A step is searched for a steady state after this many times the pipeline's depth.
SAMPLE_DEPTHS = 9


@dataclass(frozen=True, eq=False)
class Timeline:
    """The operations of all ranks with their times: one entry for each operation, sorted by rank, then by time."""

    makespan_s: float
    """Seconds of the whole step."""
    busy_s: FloatArray
    """Seconds that each rank computes, [ranks]."""
    rank: NDArray[np.int32]
    """[operations]"""
    kind: NDArray[np.int32]
    """Indices into OPERATION_KINDS, [operations]."""
    stage: NDArray[np.int32]
    """[operations]"""
    micro_batch: NDArray[np.int32]
    """[operations]"""
    start_s: FloatArray
    """[operations]"""
    end_s: FloatArray
    """[operations]"""


class ExecutionSequence(NamedTuple):
    """All operations of a schedule in one sequence in which each comes after all operations that it waits for."""

    source: "array[int]"
    """For each operation, the position of the operation on another rank that sends its input. Operations that receive
    nothing have the length of the sequence here."""
    rank: "array[int]"
    """The rank of each operation."""
    duration: "array[int]"
    """For each operation, the index of its seconds in the list of durations: kind * stages + stage."""
    position: NDArray[np.int32]
    """The position in the sequence of each operation of the operation table (rank after rank)."""


def sequence_operations(table: OperationTable, schedule: Schedule, chunks: int) -> ExecutionSequence:
    """Put the operations of all ranks into one sequence in which each follows its inputs. Takes linear time.

    Raises:
        AssertionError: the ranks would wait for each other forever, or an operation comes before its own input: a
            defect.
    """
    ranks, length = table.kind.shape
    stages = ranks * chunks
    micro_batches = int(table.micro_batch.max()) + 1
    rank_of_stage = stage_to_rank(schedule, ranks, chunks)
    kind, stage, micro_batch = (column.astype(np.int64) for column in table)
    # Results are numbered by (type, stage, micro-batch). The types are 0 an activation, 1 its gradient, 2 a weight
    # gradient.
    result_type = np.where(kind == FORWARD, 0, np.where(kind == BACKWARD_WEIGHT, 2, 1))
    is_last_stage = stage == stages - 1
    input_stage = np.where(
        kind == FORWARD, stage - 1, np.where((kind == BACKWARD_WEIGHT) | is_last_stage, stage, stage + 1)
    )
    input_type = np.where((kind == FORWARD) | ((kind != BACKWARD_WEIGHT) & is_last_stage), 0, 1)
    results = (result_type * stages + stage) * micro_batches + micro_batch
    inputs = (input_type * stages + input_stage) * micro_batches + micro_batch
    # One more number is the input of the first stage, which exists from the start.
    available = 3 * stages * micro_batches
    reads_batch = (kind == FORWARD) & (stage == 0)
    inputs[reads_batch] = available
    is_remote = ~reads_batch & (rank_of_stage[np.maximum(input_stage, 0)] != np.arange(ranks)[:, None])
    # A backward also needs the activation of its own stage.
    needs_own = (kind == FULL_BACKWARD) | (kind == BACKWARD_INPUT)
    own_activations = np.where(needs_own, stage * micro_batches + micro_batch, available)

    total = ranks * length
    ready = bytearray(available + 1)
    ready[available] = 1
    sequence: list[int] = []
    done = [0] * ranks
    rows_of_ranks = list(zip(results.tolist(), inputs.tolist(), own_activations.tolist(), strict=True))
    while len(sequence) < total:
        length_before = len(sequence)
        for rank, (rank_results, rank_inputs, rank_own) in enumerate(rows_of_ranks):
            start = index = done[rank]
            while index < length and ready[rank_inputs[index]] and ready[rank_own[index]]:
                ready[rank_results[index]] = 1
                index += 1
            sequence.extend(range(rank * length + start, rank * length + index))
            done[rank] = index
        if len(sequence) == length_before:
            stuck = next(rank for rank in range(ranks) if done[rank] < length)
            raise AssertionError(f"deadlock: the pipeline's order stops at operation {done[stuck]} of rank {stuck}")
    flat = np.asarray(sequence, dtype=np.int64)
    position = np.empty(total, dtype=np.int32)
    position[flat] = np.arange(total, dtype=np.int32)
    producer = np.full(available + 1, total, dtype=np.int32)
    producer[results.reshape(-1)] = position
    source = np.where(is_remote, producer[inputs], total).astype(np.int32)
    return ExecutionSequence(
        array("i", source.reshape(-1)[flat].tobytes()),
        array("i", (flat // length).astype(np.int32).tobytes()),
        array("i", (kind * stages + stage).reshape(-1)[flat].astype(np.int32).tobytes()),
        position,
    )


@lru_cache(maxsize=64)
def execution_sequence(schedule: Schedule, ranks: int, micro_batches: int, chunks: int) -> ExecutionSequence:
    """The operations of a step of a schedule, in one sequence."""
    return sequence_operations(operation_table(schedule, ranks, micro_batches, chunks), schedule, chunks)


def _end_times(sequence: ExecutionSequence, ranks: int, durations: list[float], send_s: float) -> list[float]:
    """The end of each operation of the sequence. A last entry, -inf, is for the input that exists from the start."""
    ends = [0.0] * len(sequence.source)
    ends.append(-inf)
    free = [0.0] * ranks
    operations = zip(sequence.source, sequence.rank, sequence.duration, strict=True)
    for position, (source, rank, duration) in enumerate(operations):
        start = ends[source] + send_s
        busy_until = free[rank]
        if busy_until > start:
            start = busy_until
        ends[position] = free[rank] = start + durations[duration]
    return ends


def operation_durations(
    schedule: Schedule,
    ranks: int,
    chunks: int,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    weight_fraction: float,
) -> list[float]:
    """Seconds of operations, by kind * stages + stage.

    Raises:
        ValueError: the times are not those of as many stages.
    """
    stages = ranks * chunks
    if len(forward_s) != stages or len(backward_s) != stages:
        raise ValueError(
            f"{stages} stages need as many times, but got {len(forward_s)} forward and {len(backward_s)} backward."
        )
    # Python floats: the arithmetic of the loop over operations is much slower with numpy's scalars.
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

    Does not check what torch refuses: other programs run 1F1B with fewer micro-batches than ranks.

    Args:
        forward_s: Seconds of one micro-batch through each stage, [ranks * chunks].
        backward_s: Seconds of the full backward of each stage, [ranks * chunks].
        weight_fraction: Share of `backward_s` that the weights' gradient takes, for schedules that split the backward
            (0 to 1).
        send_s: Seconds from the end of an operation to the arrival of its result at another rank. The sender computes
            on.
    """
    table = operation_table(schedule, ranks, micro_batches, chunks)
    durations = operation_durations(schedule, ranks, chunks, forward_s, backward_s, weight_fraction)
    sequence = execution_sequence(schedule, ranks, micro_batches, chunks)
    ends = np.array(_end_times(sequence, ranks, durations, send_s))
    arrivals = ends[np.asarray(sequence.source)] + send_s
    duration = np.array(durations)[np.asarray(sequence.duration)]
    shape = table.kind.shape
    end = ends[sequence.position].reshape(shape)
    free = np.concatenate([np.zeros((ranks, 1)), end[:, :-1]], axis=1)
    return Timeline(
        makespan_s=float(end.max()),
        busy_s=duration[sequence.position].reshape(shape).sum(axis=1),
        rank=np.repeat(np.arange(ranks, dtype=np.int32), shape[1]),
        kind=table.kind.reshape(-1),
        stage=table.stage.reshape(-1),
        micro_batch=table.micro_batch.reshape(-1),
        start_s=np.maximum(free, arrivals[sequence.position].reshape(shape)).reshape(-1),
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
    """Seconds of one step: `simulate(...).makespan_s`, but faster. With many micro-batches it may differ by rounding.

    The arguments are those of `simulate`.
    """
    durations = operation_durations(schedule, ranks, chunks, forward_s, backward_s, weight_fraction)

    def simulate_rounds(rounds: int) -> tuple[ExecutionSequence, list[float]]:
        sequence = execution_sequence(schedule, ranks, rounds * per_round, chunks)
        return sequence, _end_times(sequence, ranks, durations, send_s)

    per_round = int(micro_batches_per_round(schedule, ranks, np.asarray(micro_batches), chunks))
    rounds = micro_batches // per_round
    depth = 1 - int(-peak_in_flight(schedule, ranks, micro_batches, chunks).max() // (chunks * per_round))
    sample = SAMPLE_DEPTHS * depth
    if rounds >= 2 * sample:
        sequence, sample_ends = simulate_rounds(sample)
        steady_state = _steady_state(sequence, np.array(sample_ends), ranks, sample, depth)
        if steady_state:
            period, period_s = steady_state
            skipped = (rounds - sample) // period
            rest = rounds - skipped * period
            return max(sample_ends if rest == sample else simulate_rounds(rest)[1]) + skipped * period_s
    return max(simulate_rounds(rounds)[1])


def _steady_state(
    sequence: ExecutionSequence, ends: FloatArray, ranks: int, rounds: int, depth: int
) -> tuple[int, float] | None:
    """The period of a steady state, in rounds, and its seconds; None if the ranks do not repeat themselves.

    An operation waits only for operations that are less than `depth` rounds before. If all operations of `depth` rounds
    end the same time after those one period before, so do all that follow, up to the drain.
    """
    end = ends[sequence.position].reshape(ranks, -1)
    code = np.asarray(sequence.duration)[sequence.position].reshape(ranks, -1)
    length = end.shape[1] // rounds
    # The last rounds do not count: in a longer step their operations come in another order and wait for others.
    stop = (rounds - 2 * depth - 1) * length
    begin = stop - depth * length
    tolerance = STEADY_TOLERANCE * float(end.max())
    for period in range(1, depth + 1):
        shift = period * length
        increments = end[:, begin:stop] - end[:, begin - shift : stop - shift]
        shortest, longest = float(increments.min()), float(increments.max())
        if longest - shortest > tolerance:
            continue
        if np.array_equal(code[:, begin:stop], code[:, begin - shift : stop - shift]):
            return period, (shortest + longest) / 2
    return None
