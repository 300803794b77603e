"""The order in which the ranks of a pipeline compute: torch's pipeline schedules, without importing torch.

The schedules are those of torch.distributed.pipelining. `operations` gives the order for people and tests,
`operation_table` the same as arrays for the simulation of a step. The other functions count operations without laying
out the order. Stages are numbered as in stage_layout.py.
"""

from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from moreh.errors import PlanError
from moreh.planner.plan.arrays import IntArray
from moreh.planner.plan.plan import SCHEDULES, Schedule

# torch's letters: forward, full backward, backward for the input only, backward for the weights only.
OperationKind = Literal["F", "B", "I", "W"]
OPERATION_KINDS: tuple[OperationKind, ...] = ("F", "B", "I", "W")
# The codes of the kinds in arrays: indices into OPERATION_KINDS.
FORWARD, FULL_BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT = range(4)
# The schedules that split the backward pass into the gradient of the input and that of the weights.
SPLIT_BACKWARD: tuple[Schedule, ...] = ("zero-bubble", "zbv")


class Operation(NamedTuple):
    """One computation of a rank."""

    kind: OperationKind
    stage: int
    """Number of the stage in the model's order."""
    micro_batch: int
    """Number of the micro-batch."""


class OperationTable(NamedTuple):
    """The operations of all ranks as arrays [ranks, operations of a rank], each rank's in its own order."""

    kind: NDArray[np.int32]
    """Indices into OPERATION_KINDS."""
    stage: NDArray[np.int32]
    """Numbers of the stages in the model's order."""
    micro_batch: NDArray[np.int32]
    """Numbers of the micro-batches."""


def check_schedule(schedule: Schedule, ranks: int, micro_batches: int, chunks: int) -> None:
    """Check a schedule for `ranks` pipeline ranks with `chunks` stages each and `micro_batches` micro-batches.

    - "1f1b" needs one chunk and at least as many micro-batches as ranks.
    - "interleaved" and "zero-bubble" need micro-batches that split into max(1, micro_batches // ranks) rounds of equal
      size.
    - "zbv" needs two chunks.

    Everything else is allowed, such as fewer micro-batches than ranks in all schedules but "1f1b".

    Raises:
        PlanError: torch refuses the combination.
    """
    if schedule not in SCHEDULES:
        raise PlanError(f"schedule={schedule!r} is unknown; use one of {', '.join(map(repr, SCHEDULES))}.")
    for name, value in (("ranks", ranks), ("micro_batches", micro_batches), ("chunks", chunks)):
        if value < 1:
            raise PlanError(f"{name}={value} is not possible in a pipeline; give at least 1.")
    if schedule == "1f1b":
        if chunks != 1:
            raise PlanError(
                f"chunks={chunks} does not go with schedule='1f1b', where each rank holds exactly 1 chunk of the "
                "model; use chunks=1 or schedule='interleaved'."
            )
        if micro_batches < ranks:
            raise PlanError(
                f"micro_batches={micro_batches} is too few for schedule='1f1b' over {ranks} ranks, which needs at "
                f"least {ranks}; use smaller micro-batches, fewer ranks or schedule='interleaved'."
            )
    elif schedule == "zbv":
        if chunks != 2:
            raise PlanError(
                f"chunks={chunks} does not go with schedule='zbv', where each rank holds exactly 2 chunks of the "
                "model, one of each side of the V; use chunks=2 or schedule='zero-bubble'."
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
    """True where `check_schedule` accepts a candidate. The arrays broadcast. Raises for no values."""
    ranks, micro_batches, chunks = np.asarray(ranks), np.asarray(micro_batches), np.asarray(chunks)
    positive = (ranks >= 1) & (micro_batches >= 1) & (chunks >= 1)
    if schedule == "1f1b":
        return positive & (chunks == 1) & (micro_batches >= ranks)
    if schedule == "zbv":
        return positive & (chunks == 2)
    if schedule in ("interleaved", "zero-bubble"):
        return positive & (micro_batches % np.maximum(1, micro_batches // np.maximum(1, ranks)) == 0)
    return np.zeros_like(positive)


def micro_batches_per_round(schedule: Schedule, ranks: int, micro_batches: IntArray, chunks: int) -> IntArray:
    """Number of consecutive micro-batches that a rank takes through one chunk before the next chunk.

    Args:
        micro_batches: Micro-batches of a step, in any shape. The result has the same shape.
    """
    if chunks == 1 or schedule == "zbv":
        return np.ones_like(micro_batches)
    return micro_batches // np.maximum(1, micro_batches // ranks)


def warmup_forwards(schedule: Schedule, ranks: int, micro_batches: IntArray, chunks: int) -> IntArray:
    """Forwards of each rank before it alternates between forwards and backwards, for all schedules except "zbv".

    These are a whole round of micro-batches through all chunks but the last, and then one forward for each rank that
    follows. "interleaved" has two for each (https://arxiv.org/abs/2104.04473, section 2.2), which keeps a rank busy
    while its neighbor computes.

    Args:
        micro_batches: Micro-batches of a step, [...]. The result is [..., ranks].
    """
    ranks_after = np.arange(ranks - 1, -1, -1)
    per_round = micro_batches_per_round(schedule, ranks, micro_batches, chunks)
    warmup = (chunks - 1) * per_round[..., None] + (2 if schedule == "interleaved" else 1) * ranks_after
    return np.minimum(warmup, (micro_batches * chunks)[..., None])


def _looped_table(schedule: Schedule, ranks: int, micro_batches: int, chunks: int) -> OperationTable:
    """Schedules that loop over their chunks: 1F1B, interleaved 1F1B and zero-bubble.

    1F1B is from https://arxiv.org/abs/2104.04473, the zero-bubble schedule ZB1P from https://arxiv.org/abs/2401.10241.
    """
    count_array = np.asarray(micro_batches)
    per_round = int(micro_batches_per_round(schedule, ranks, count_array, chunks))
    # Forwards of a rank, and as many backwards.
    count = micro_batches * chunks
    warmup = warmup_forwards(schedule, ranks, count_array, chunks)[:, None]
    rank, index = np.arange(ranks)[:, None], np.arange(count)
    # The chunk and the micro-batch of a rank's forward number `index`; backwards take the chunks in reverse.
    chunk = index // per_round % chunks
    micro_batch = index // (per_round * chunks) * per_round + index % per_round
    # Time slots, three for each step of the part that alternates. Its step i has forward number warmup + i, backward
    # number i and the backward for the weights of `rank` steps before.
    slots = [
        np.where(index < warmup, index - warmup, 3 * (index - warmup)),
        np.broadcast_to(3 * index + 1, (ranks, count)),
    ]
    kinds, stages = [FORWARD, FULL_BACKWARD], [chunk * ranks + rank, (chunks - 1 - chunk) * ranks + rank]
    if schedule in SPLIT_BACKWARD:
        slots.append(3 * (index + rank) + 2)
        kinds, stages = [FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT], [*stages, stages[1]]
    sequence = np.argsort(np.concatenate(slots, axis=1), axis=1, kind="stable")

    def by_slot(columns: list[IntArray]) -> NDArray[np.int32]:
        return np.take_along_axis(np.concatenate(columns, axis=1).astype(np.int32), sequence, axis=1)

    shape = (ranks, count)
    return OperationTable(
        by_slot([np.full(shape, kind) for kind in kinds]),
        by_slot(stages),
        by_slot([np.broadcast_to(micro_batch, shape)] * len(kinds)),
    )


def _zbv_table(ranks: int, micro_batches: int) -> OperationTable:
    """ZB-V (https://arxiv.org/abs/2401.10241, section 6), in the order in which torch runs it."""
    # The schedule is defined for a full pipeline. The operations of micro-batches beyond those that exist are left out.
    full = max(2 * ranks - 1, micro_batches)
    table = np.empty((3, ranks, 6 * micro_batches), dtype=np.int32)
    for rank in range(ranks):
        # The rank's stages on the descending and the ascending side of the V, and the ranks from this one to the turn.
        down, up, to_turn = rank, 2 * ranks - 1 - rank, ranks - rank
        fill = 2 * to_turn - 1
        # Kind, stage, first micro-batch, end of the micro-batches, phase, and slot in each turn of the phase. The
        # phases: 0 fill the descending side, 1 both sides, 2 turn round, 3 steady, 4 to 7 drain.
        runs = (
            (FORWARD, down, 0, fill, 0, 0),
            (FORWARD, down, fill, fill + rank, 1, 1),
            (FORWARD, down, fill + rank, full, 3, 0),
            (FORWARD, up, 0, rank, 1, 0),
            (FORWARD, up, rank, ranks, 2, 0),
            (FORWARD, up, ranks, full, 3, 3),
            (BACKWARD_INPUT, down, 0, full - ranks, 3, 1),
            (BACKWARD_INPUT, down, full - ranks, full - to_turn, 4, 0),
            (BACKWARD_INPUT, down, full - to_turn, full, 5, 0),
            (BACKWARD_WEIGHT, down, 0, full - ranks, 3, 2),
            (BACKWARD_WEIGHT, down, full - ranks, full - rank, 5, 1),
            (BACKWARD_WEIGHT, down, full - rank, full, 7, 0),
            (BACKWARD_INPUT, up, 0, to_turn, 2, 1),
            (BACKWARD_INPUT, up, to_turn, full - rank, 3, 4),
            (BACKWARD_INPUT, up, full - rank, full, 4, 1),
            (BACKWARD_WEIGHT, up, 0, to_turn, 2, 2),
            (BACKWARD_WEIGHT, up, to_turn, full - rank, 3, 5),
            (BACKWARD_WEIGHT, up, full - rank, full, 6, 0),
        )
        columns = []
        for kind, stage, first, end, phase, slot_in_turn in runs:
            micro_batch = np.arange(first, min(end, micro_batches))
            slot = phase * 6 * full + 6 * (micro_batch - first) + slot_in_turn
            columns.append(np.stack([slot, np.full_like(slot, kind), np.full_like(slot, stage), micro_batch]))
        joined = np.concatenate(columns, axis=1)
        table[:, rank] = joined[1:, np.argsort(joined[0])]
    return OperationTable(*table)


def operation_table(schedule: Schedule, ranks: int, micro_batches: int, chunks: int) -> OperationTable:
    """`operations` as arrays, and without its check. All ranks have the same number of operations."""
    if schedule == "zbv":
        return _zbv_table(ranks, micro_batches)
    return _looped_table(schedule, ranks, micro_batches, chunks)


def operations(schedule: Schedule, ranks: int, micro_batches: int, chunks: int) -> tuple[tuple[Operation, ...], ...]:
    """The operations of each rank in the order in which torch's schedule runs them.

    Raises:
        PlanError: torch refuses the combination.
    """
    check_schedule(schedule, ranks, micro_batches, chunks)
    table = operation_table(schedule, ranks, micro_batches, chunks)
    rows_of_ranks = zip(*(column.tolist() for column in table), strict=True)
    return tuple(
        tuple(
            Operation(OPERATION_KINDS[kind], stage, micro_batch) for kind, stage, micro_batch in zip(*rows, strict=True)
        )
        for rows in rows_of_ranks
    )


@lru_cache(maxsize=4096)
def peak_in_flight(schedule: Schedule, ranks: int, micro_batches: int, chunks: int) -> IntArray:
    """The largest number of (stage, micro-batch) activations that each rank holds at once, [ranks].

    An activation is held from its forward to its backward; with a split backward, to the backward for the weights. The
    array is shared between calls and read-only. Does not check what torch refuses.
    """
    rank = np.arange(ranks)
    if schedule == "zbv":
        # On the ascending side, the micro-batches of the fill phase wait for the turn: at most rank + 1 of them.
        peak = np.minimum(2 * ranks, micro_batches + np.minimum(micro_batches, rank + 1))
    else:
        warmup = warmup_forwards(schedule, ranks, np.asarray(micro_batches), chunks)
        # Besides the warmup, the forward of the first alternating step, and those whose backward for the weights is
        # delayed.
        waiting = 1 + rank if schedule == "zero-bubble" else 1
        peak = np.minimum(warmup + waiting, micro_batches * chunks)
    peak.flags.writeable = False
    return cast("IntArray", peak)


@lru_cache(maxsize=4096)
def peak_deferred_weight_grads(schedule: Schedule, ranks: int, micro_batches: int, chunks: int) -> IntArray:
    """The largest number of (stage, micro-batch) pairs at once that wait for their backward for the weights, [ranks].

    Their backward for the input is done, so the gradients of all matmul results are kept for each of them. 0 without a
    split backward.
    """
    if schedule not in SPLIT_BACKWARD:
        return np.zeros(ranks, dtype=np.int64)
    if schedule == "zero-bubble":
        return np.minimum(1 + np.arange(ranks), micro_batches * chunks)
    if micro_batches >= 2 * ranks - 1:
        return 1 + 2 * np.arange(ranks)
    kind = operation_table(schedule, ranks, micro_batches, chunks).kind
    deferred = np.cumsum((kind == BACKWARD_INPUT).astype(np.int64) - (kind == BACKWARD_WEIGHT), axis=1)
    return np.maximum(0, deferred.max(axis=1))
