"""The micro-batches that a rank holds at the moments of a schedule with a split backward pass."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moreh.planner.plan.arrays import FloatArray, IntArray
from moreh.planner.plan.plan import Schedule
from moreh.planner.plan.schedules import BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, operation_table
from moreh.planner.plan.stage_layout import rank_to_stages


@dataclass(frozen=True)
class SplitBackwardMoments:
    """Moments of a step on each rank: the ends of its operations, and the loss. In no order, equal ones once.

    Arrays are [ranks, moments, chunks] or [ranks, moments], and read-only. Ranks with fewer moments repeat one.
    """

    in_flight: FloatArray
    """Micro-batches between the forward pass and the end of the backward pass for the weights."""
    deferred: FloatArray
    """Those of them that wait for the backward pass for the weights."""
    has_gradients: FloatArray
    """1 if the stage's weights have gradients, else 0."""
    waiting_logits: FloatArray
    """Micro-batches whose logits are kept, for the backward pass of the loss or after it; not the one in `in_loss`."""
    in_loss: FloatArray
    """1 in the backward pass of the loss, else 0."""
    in_input_backward: FloatArray
    """1 at the end of a backward pass for the input, before its last temporaries are freed, else 0."""
    adds_gradients: FloatArray
    """1 for the chunk whose gradients a backward pass for the weights adds to those of earlier micro-batches."""


@lru_cache(maxsize=4096)
def split_backward_moments(schedule: Schedule, ranks: int, micro_batches: int, chunks: int) -> SplitBackwardMoments:
    """The moments of a schedule of `SPLIT_BACKWARD`. Does not check what torch refuses."""
    table = operation_table(schedule, ranks, micro_batches, chunks)
    stages = rank_to_stages(schedule, ranks, chunks)
    of_chunk = table.stage[:, :, None] == stages[:, None, :]

    def done(kind: int) -> tuple[IntArray, IntArray]:
        """The operations of a kind that each chunk has done after each operation, and before it."""
        now = ((table.kind == kind)[:, :, None] & of_chunk).astype(np.int64)
        after = np.cumsum(now, axis=1)
        return after, after - now

    forwards, _ = done(FORWARD)
    inputs, inputs_before = done(BACKWARD_INPUT)
    weights, weights_before = done(BACKWARD_WEIGHT)
    is_last = stages[:, None, :] == ranks * chunks - 1
    of_last = (of_chunk & is_last).any(axis=2)
    is_input, is_weight = table.kind == BACKWARD_INPUT, table.kind == BACKWARD_WEIGHT
    waiting = ((forwards - inputs) * is_last).sum(axis=2)
    # torch keeps the logits to the end of the backward pass for the input, beside their gradient.
    waiting_at_ends = waiting + (is_input & of_last)
    zeros = np.zeros_like(waiting)
    at_ends = _columns(
        forwards - weights,
        inputs - weights,
        weights > 0,
        waiting_at_ends,
        zeros,
        is_input,
        is_weight[:, :, None] & of_chunk & (weights_before > 0),
    )
    in_losses = _columns(
        forwards - weights_before,
        inputs_before - weights_before,
        weights_before > 0,
        waiting,
        zeros + 1,
        zeros,
        np.zeros_like(of_chunk),
    )
    has_loss = (is_input & of_last)[:, :, None]
    every = np.concatenate([at_ends, np.where(has_loss, in_losses, at_ends)], axis=1)
    unique = [np.unique(of_rank, axis=0) for of_rank in every]
    longest = max(len(of_rank) for of_rank in unique)
    padded = np.stack([np.pad(of_rank, ((0, longest - len(of_rank)), (0, 0)), mode="edge") for of_rank in unique])
    padded.flags.writeable = False
    parts = np.split(padded, np.cumsum([chunks, chunks, chunks, 1, 1, 1]), axis=2)
    in_flight, deferred, has_gradients, waiting_logits, in_loss, in_input_backward, adds_gradients = parts
    return SplitBackwardMoments(
        in_flight,
        deferred,
        has_gradients,
        waiting_logits[:, :, 0],
        in_loss[:, :, 0],
        in_input_backward[:, :, 0],
        adds_gradients,
    )


def _columns(*arrays: np.ndarray) -> FloatArray:
    """Arrays [ranks, moments] and [ranks, moments, chunks] side by side, [ranks, moments, columns]."""
    return np.concatenate([a if a.ndim == 3 else a[:, :, None] for a in arrays], axis=2).astype(np.float64)
