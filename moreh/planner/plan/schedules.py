"""The order in which the ranks of a pipeline compute: the schedules of torch.distributed.pipelining, without importing torch.

Stages are numbered in the model's order, 0 to ranks * chunks - 1. "1f1b", "interleaved" and "zero-bubble" place stage s on
rank s % ranks; "zbv" folds the model into a V, so that rank r holds the stages r and 2 * ranks - 1 - r.
"""

from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from moreh.errors import PlanError
from moreh.planner.plan.arrays import Integers
from moreh.planner.plan.plan import SCHEDULES, Schedule

# Forward, full backward, backward for the input only, backward for the weights only.
Kind = Literal["F", "B", "I", "W"]
KINDS: tuple[Kind, ...] = ("F", "B", "I", "W")
F, B, I, W = range(4)  # noqa: E741
# The schedules that split the backward pass into the gradient of the input and that of the weights.
SPLIT_BACKWARD: tuple[Schedule, ...] = ("zero-bubble", "zbv")


class Operation(NamedTuple):
    """One computation of a rank: `kind` for one micro-batch through one stage."""

    kind: Kind
    stage: int
    micro_batch: int


class Order(NamedTuple):
    """The operations of all ranks as arrays [ranks, operations of a rank], in the order of each rank."""

    kind: NDArray[np.int32]
    stage: NDArray[np.int32]
    micro_batch: NDArray[np.int32]


def check_schedule(schedule: Schedule, ranks: int, micro_batches: int, chunks: int) -> None:
    """Raise PlanError where torch refuses a pipeline of `ranks` ranks with `chunks` stages each and so many micro-batches.

    "1f1b" needs one chunk and at least as many micro-batches as ranks. "interleaved" and "zero-bubble" run the micro-batches
    in max(1, micro_batches // ranks) rounds of equal size. "zbv" needs two chunks. The rest is allowed: fewer
    micro-batches than ranks, for example, in all schedules except "1f1b".
    """
    if schedule not in SCHEDULES:
        raise PlanError(f"schedule={schedule!r} is unknown; use one of {', '.join(map(repr, SCHEDULES))}.")
    for name, value in (("ranks", ranks), ("micro_batches", micro_batches), ("chunks", chunks)):
        if value < 1:
            raise PlanError(f"{name}={value} is not possible in a pipeline; give at least 1.")
    if schedule == "1f1b":
        if chunks != 1:
            raise PlanError(
                f"chunks={chunks} does not go with schedule='1f1b', where each rank holds exactly 1 chunk of the model; "
                "use chunks=1 or schedule='interleaved'."
            )
        if micro_batches < ranks:
            raise PlanError(
                f"micro_batches={micro_batches} is too few for schedule='1f1b' over {ranks} ranks, which needs at least "
                f"{ranks}; use smaller micro-batches, fewer ranks or schedule='interleaved'."
            )
    elif schedule == "zbv":
        if chunks != 2:
            raise PlanError(
                f"chunks={chunks} does not go with schedule='zbv', where each rank holds exactly 2 chunks of the model, "
                "one of each side of the V; use chunks=2 or schedule='zero-bubble'."
            )
    else:
        rounds = max(1, micro_batches // ranks)
        if micro_batches % rounds:
            lower = micro_batches - micro_batches % rounds
            upper = (micro_batches // ranks + 1) * ranks
            raise PlanError(
                f"micro_batches={micro_batches} cannot be divided into {rounds} equal rounds (micro_batches // ranks, "
                f"with ranks={ranks}), as schedule={schedule!r} needs; use {lower} or {upper} micro-batches, "
                "or any other multiple of ranks."
            )


def is_runnable(
    schedule: str,
    ranks: NDArray[np.integer[Any]],
    micro_batches: NDArray[np.integer[Any]],
    chunks: NDArray[np.integer[Any]],
) -> NDArray[np.bool_]:
    """Whether `check_schedule` accepts, for arrays of candidates (shapes that broadcast). No error for any values."""
    ranks, micro_batches, chunks = np.asarray(ranks), np.asarray(micro_batches), np.asarray(chunks)
    positive = (ranks >= 1) & (micro_batches >= 1) & (chunks >= 1)
    if schedule == "1f1b":
        return positive & (chunks == 1) & (micro_batches >= ranks)
    if schedule == "zbv":
        return positive & (chunks == 2)
    if schedule in ("interleaved", "zero-bubble"):
        return positive & (micro_batches % np.maximum(1, micro_batches // np.maximum(1, ranks)) == 0)
    return np.zeros_like(positive)


def stages_of_ranks(schedule: Schedule, ranks: int, chunks: int) -> Integers:
    """The stages each rank holds, [ranks, chunks], ascending within a rank."""
    rank = np.arange(ranks)
    if schedule == "zbv":
        return np.stack([rank, 2 * ranks - 1 - rank], axis=1)
    return rank[:, None] + ranks * np.arange(chunks)


def micro_batches_per_round(schedule: Schedule, ranks: int, micro_batches: Integers, chunks: int) -> Integers:
    """How many micro-batches in a row a rank takes through one chunk before it turns to the next chunk, [...] as given."""
    if chunks == 1 or schedule == "zbv":
        return np.ones_like(micro_batches)
    return micro_batches // np.maximum(1, micro_batches // ranks)


def warmup_forwards(schedule: Schedule, ranks: int, micro_batches: Integers, chunks: int) -> Integers:
    """Forwards of each rank before it starts to alternate with backwards, [..., ranks]; for all schedules except "zbv".

    All chunks but the last for a whole round, and then one forward for each rank that follows: two in "interleaved"
    (https://arxiv.org/abs/2104.04473, section 2.2), which keeps a rank busy while its neighbour computes.
    """
    hops = np.arange(ranks - 1, -1, -1)
    per_round = micro_batches_per_round(schedule, ranks, micro_batches, chunks)
    warmup = (chunks - 1) * per_round[..., None] + (2 if schedule == "interleaved" else 1) * hops
    return np.minimum(warmup, (micro_batches * chunks)[..., None])


def _looped_order(schedule: Schedule, ranks: int, micro_batches: int, chunks: int) -> Order:
    """1F1B (https://arxiv.org/abs/2104.04473) and zero bubble ZB1P (https://arxiv.org/abs/2401.10241), by chunks in turn."""
    given = np.asarray(micro_batches)
    per_round = int(micro_batches_per_round(schedule, ranks, given, chunks))
    count = micro_batches * chunks
    warmup = warmup_forwards(schedule, ranks, given, chunks)[:, None]
    rank, turn = np.arange(ranks)[:, None], np.arange(count)
    chunk = turn // per_round % chunks
    micro_batch = turn // (per_round * chunks) * per_round + turn % per_round
    # Slot i of the part that alternates: forward number warmup + i, backward number i and, delayed by as many slots
    # as the rank's number, the backward for the weights.
    slots = [np.where(turn < warmup, turn - warmup, 3 * (turn - warmup)), np.broadcast_to(3 * turn + 1, (ranks, count))]
    kinds, stages = [F, B], [chunk * ranks + rank, (chunks - 1 - chunk) * ranks + rank]
    if schedule in SPLIT_BACKWARD:
        slots.append(3 * (turn + rank) + 2)
        kinds, stages = [F, I, W], [*stages, stages[1]]
    sequence = np.argsort(np.concatenate(slots, axis=1), axis=1, kind="stable")

    def arranged(parts: list[Integers]) -> NDArray[np.int32]:
        return np.take_along_axis(np.concatenate(parts, axis=1).astype(np.int32), sequence, axis=1)

    shape = (ranks, count)
    return Order(
        arranged([np.full(shape, kind) for kind in kinds]),
        arranged(stages),
        arranged([np.broadcast_to(micro_batch, shape)] * len(kinds)),
    )


def _folded_order(ranks: int, micro_batches: int) -> Order:
    """ZB-V (https://arxiv.org/abs/2401.10241, section 6), as torch writes it down."""
    # The schedule is made for a full pipeline; of the micro-batches beyond those there are, nothing is run.
    full = max(2 * ranks - 1, micro_batches)
    table = np.empty((3, ranks, 6 * micro_batches), dtype=np.int32)
    for rank in range(ranks):
        low, high, behind = rank, 2 * ranks - 1 - rank, ranks - rank
        filled = 2 * behind - 1
        # kind, stage, first micro-batch, the one after the last, and when: phase and place in a turn of this phase. The phases:
        # 0 fill the descending side, 1 both sides, 2 turn round, 3 steady, 4 to 7 drain.
        pieces = (
            (F, low, 0, filled, 0, 0),
            (F, low, filled, filled + rank, 1, 1),
            (F, low, filled + rank, full, 3, 0),
            (F, high, 0, rank, 1, 0),
            (F, high, rank, ranks, 2, 0),
            (F, high, ranks, full, 3, 3),
            (I, low, 0, full - ranks, 3, 1),
            (I, low, full - ranks, full - behind, 4, 0),
            (I, low, full - behind, full, 5, 0),
            (W, low, 0, full - ranks, 3, 2),
            (W, low, full - ranks, full - rank, 5, 1),
            (W, low, full - rank, full, 7, 0),
            (I, high, 0, behind, 2, 1),
            (I, high, behind, full - rank, 3, 4),
            (I, high, full - rank, full, 4, 1),
            (W, high, 0, behind, 2, 2),
            (W, high, behind, full - rank, 3, 5),
            (W, high, full - rank, full, 6, 0),
        )
        columns = []
        for kind, stage, first, end, phase, place in pieces:
            micro_batch = np.arange(first, min(end, micro_batches))
            slot = phase * 6 * full + 6 * (micro_batch - first) + place
            columns.append(np.stack([slot, np.full_like(slot, kind), np.full_like(slot, stage), micro_batch]))
        joined = np.concatenate(columns, axis=1)
        table[:, rank] = joined[1:, np.argsort(joined[0])]
    return Order(*table)


def order(schedule: Schedule, ranks: int, micro_batches: int, chunks: int) -> Order:
    """As `operations`, as arrays and without its check. All ranks have the same number of operations."""
    if schedule == "zbv":
        return _folded_order(ranks, micro_batches)
    return _looped_order(schedule, ranks, micro_batches, chunks)


def operations(schedule: Schedule, ranks: int, micro_batches: int, chunks: int) -> tuple[tuple[Operation, ...], ...]:
    """The operations of each rank in the order in which torch runs them: Schedule1F1B, ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble and ScheduleZBVZeroBubble of torch.distributed.pipelining.

    Raises:
        PlanError: torch refuses the combination.
    """
    check_schedule(schedule, ranks, micro_batches, chunks)
    kinds, stages, micro = (part.tolist() for part in order(schedule, ranks, micro_batches, chunks))
    return tuple(
        tuple(Operation(KINDS[kind], stage, index) for kind, stage, index in zip(*row, strict=True))
        for row in zip(kinds, stages, micro, strict=True)
    )


@lru_cache(maxsize=4096)
def peak_in_flight(schedule: Schedule, ranks: int, micro_batches: int, chunks: int) -> Integers:
    """The largest number of (stage, micro-batch) activations that each rank holds at once, [ranks].

    An activation is held from its forward to its backward; with a split backward, to the backward for the weights. The
    array is shared between calls and cannot be written. Without check of what torch refuses.
    """
    rank = np.arange(ranks)
    if schedule == "zbv":
        # All of the ascending side's first micro-batches wait for the turn: at most rank + 1 of them.
        peak = np.minimum(2 * ranks, micro_batches + np.minimum(micro_batches, rank + 1))
    else:
        warmup = warmup_forwards(schedule, ranks, np.asarray(micro_batches), chunks)
        # The forward of the first slot, and those that wait for a delayed backward for the weights.
        waiting = 1 + rank if schedule == "zero-bubble" else 1
        peak = np.minimum(warmup + waiting, micro_batches * chunks)
    peak.flags.writeable = False
    return cast("Integers", peak)


@lru_cache(maxsize=4096)
def peak_waiting_weights(schedule: Schedule, ranks: int, micro_batches: int, chunks: int) -> Integers:
    """The largest number of (stage, micro-batch) pairs whose backward for the weights waits while that for the input is done,
    [ranks]: for each of them the gradients of all matrix products' results are kept. 0 without a split backward.
    """
    if schedule not in SPLIT_BACKWARD:
        return np.zeros(ranks, dtype=np.int64)
    if schedule == "zero-bubble":
        return np.minimum(1 + np.arange(ranks), micro_batches * chunks)
    if micro_batches >= 2 * ranks - 1:
        return 1 + 2 * np.arange(ranks)
    rows = order(schedule, ranks, micro_batches, chunks)
    waiting = np.cumsum((rows.kind == I).astype(np.int64) - (rows.kind == W), axis=1)
    return np.maximum(0, waiting.max(axis=1))
