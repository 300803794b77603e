"""Lower bounds of the time of one pipeline step, for many candidates at once and without simulation.

The search simulates candidates in the order of these bounds and stops where no bound is below the best times found.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from moreh.planner.plan.arrays import BoolArray, FloatArray, IntArray
from moreh.planner.plan.plan import Schedule
from moreh.planner.plan.schedules import SPLIT_BACKWARD, micro_batches_per_round, warmup_forwards
from moreh.planner.plan.stage_layout import rank_to_stages, stage_to_rank


@dataclass(frozen=True)
class PipelineTable:
    """`n` candidates with the same schedule, ranks and chunks. `simulate` documents the seconds."""

    schedule: Schedule
    """The schedule of all candidates."""
    ranks: int
    """Pipeline ranks of each candidate."""
    chunks: int
    """Stages of each rank."""
    micro_batches: IntArray
    """Micro-batches of a step, [n]."""
    forward_s: FloatArray
    """[n, stages]"""
    backward_s: FloatArray
    """[n, stages]"""
    weight_fraction: float | FloatArray
    """A number, or [n, 1]."""
    send_s: FloatArray
    """[n]"""

    @property
    def splits_backward(self) -> bool:
        """True if the schedule computes the gradients of inputs and of weights separately."""
        return self.schedule in SPLIT_BACKWARD

    @cached_property
    def input_s(self) -> FloatArray:
        """Seconds of each backward that the previous stage waits for, [n, stages]."""
        return self.backward_s * (1 - self.weight_fraction) if self.splits_backward else self.backward_s

    @cached_property
    def weight_s(self) -> FloatArray:
        """Seconds of each backward for the weights alone, [n, stages]; 0 without a split backward."""
        return self.backward_s - self.input_s

    def rank_work_s(self, stage_s: FloatArray, counts: FloatArray | None = None) -> FloatArray:
        """Seconds of each rank, [n, ranks], in one pass over its chunks, or `counts` passes, [n, chunks, ranks]."""
        if self.schedule == "zbv":
            by_chunk = stage_s[:, rank_to_stages(self.schedule, self.ranks, self.chunks).T]
        else:
            by_chunk = stage_s.reshape(-1, self.chunks, self.ranks)
        return np.sum(by_chunk if counts is None else by_chunk * counts, axis=1)


def makespan_lower_bound(plans: PipelineTable) -> FloatArray:
    """Seconds that one step takes at least, for n candidates at once, [n]: never more than their `makespan`.

    Each bound is the length of a path of operations that wait for each other:

    - through one micro-batch alone;
    - for each rank: to its first operation, through all its work, and from its last operation back to the first stage;
    - the same, where the first and the last micro-batch's way to the end of the model and back replaces the rank's work
      in the meantime.

    For equal stages and no time to send this gives the makespan of 1F1B, (micro_batches + ranks - 1)(forward +
    backward), and of interleaved 1F1B (https://arxiv.org/abs/2104.04473, section 2.2). Does not check what torch
    refuses.
    """
    stages = rank_to_stages(plans.schedule, plans.ranks, plans.chunks)
    first_stage, last_stage = stages[:, 0], stages[:, -1]
    input_s, weight_s = plans.input_s, plans.weight_s
    ends = operations_at_ends(plans.schedule, plans.ranks, plans.micro_batches, plans.chunks)
    down, turn, up = _ways_s(plans)

    # From the end of a rank's last backward: on to the first stage, or only to some rank that still has weights to do.
    after: FloatArray = np.zeros((len(up), plans.ranks))
    if plans.splits_backward:
        after = plans.rank_work_s(weight_s, ends.rest_weight_grads)
    returned = up[:, first_stage]
    finish = np.maximum.accumulate(after + returned, axis=1) - returned
    last_way = np.max(returned + after, axis=1)[:, None]

    total = plans.micro_batches[:, None] * plans.rank_work_s(plans.forward_s + plans.backward_s)
    begin = down[:, first_stage]
    lead_work = plans.rank_work_s(plans.forward_s, ends.lead_forwards) + input_s[:, last_stage]
    tail_work = plans.forward_s[:, last_stage] + plans.rank_work_s(input_s, ends.tail_backwards)
    if plans.splits_backward:
        tail_work += plans.rank_work_s(weight_s, ends.tail_weight_grads)
    # The end of the first backward, and the time from the start of the last forward.
    first = np.maximum(begin + lead_work, turn + up[:, last_stage])
    last = np.maximum(tail_work - after + finish, turn - down[:, last_stage] + last_way)
    bounds = np.maximum(
        np.maximum(begin + total, first + (total - lead_work)) - after + finish, begin + total - tail_work + last
    )
    through_both = first + (total - lead_work - tail_work) + last
    if plans.schedule != "zbv":
        through_both += _round_trip_waits(plans)
    bounds = np.where(ends.alternates, np.maximum(bounds, through_both), bounds)
    return np.maximum(bounds.max(axis=1), turn[:, 0] + last_way[:, 0])


def _ways_s(plans: PipelineTable) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The way of one micro-batch alone through the stages.

    Returns:
        Seconds before its forward of each stage (down), [n, stages]; to the end of the last stage's forward (turn),
        [n, 1]; and from there to the end of its backward of each stage (up), [n, stages].
    """
    hops = np.zeros(plans.ranks * plans.chunks)
    hops[1:] = np.cumsum(np.diff(stage_to_rank(plans.schedule, plans.ranks, plans.chunks)) != 0)
    sends = plans.send_s[:, None] * hops
    forward_end = np.cumsum(plans.forward_s, axis=1) + sends
    up = np.cumsum(plans.input_s[:, ::-1], axis=1)[:, ::-1] + (sends[:, -1:] - sends)
    return forward_end - plans.forward_s, forward_end[:, -1:], up


def _round_trip_waits(plans: PipelineTable) -> FloatArray:
    """Lower bound of each rank's waits for slow sends while it alternates between forwards and backwards, [n, ranks].

    A rank's forward of step i reaches the rank d further on in step i + d (2d in "interleaved", which has as many more
    forwards before it alternates). A backward follows there and comes back in that step. Where this round trip takes
    longer than the rank's own work in these steps, the rank must wait.
    """
    ranks, chunks, micro_batches = plans.ranks, plans.chunks, plans.micro_batches
    waits: FloatArray = np.zeros((len(micro_batches), ranks))
    steps_per_hop = 2 if plans.schedule == "interleaved" else 1
    # Without the steps of the first backward and the last forward.
    steps = np.maximum(
        0.0, (micro_batches * chunks)[:, None] - warmup_forwards(plans.schedule, ranks, micro_batches, chunks) - 2
    )
    by_chunk = (len(micro_batches), chunks, ranks)
    forward, backward, weight = (s.reshape(by_chunk) for s in (plans.forward_s, plans.input_s, plans.weight_s))
    step_work, step_weight = forward.max(axis=1) + backward.max(axis=1), weight.max(axis=1)
    zeros = np.zeros((len(micro_batches), chunks, 1))
    forward, backward = (np.concatenate([zeros, np.cumsum(s, axis=2)], axis=2) for s in (forward, backward))
    # Any distance gives a bound; these few come close to the best of all.
    for distance in sorted({ranks - 1, *(2**power for power in range(ranks.bit_length()))}):
        if not 0 < distance < ranks:
            continue
        size = steps_per_hop * distance + 1
        near = ranks - distance
        # The chunk of a step differs; the quickest chunk gives a bound for all.
        way = sum((s[:, :, distance + 1 :] - s[:, :, :near]).min(axis=1) for s in (forward, backward))
        own_work = size * step_work[:, :near] + (size - 1) * step_weight[:, :near]
        wait = way + 2 * distance * plans.send_s[:, None] - own_work
        waits[:, :near] = np.maximum(waits[:, :near], np.floor(steps[:, :near] / size) * wait)
    return waits


class EndCounts(NamedTuple):
    """Numbers of operations of each chunk at both ends of a rank's order, [n, chunks, ranks] each."""

    lead_forwards: FloatArray
    """Forwards before the rank's first backward."""
    tail_backwards: FloatArray
    """Backwards (for the input, where the backward is split) after its last forward."""
    tail_weight_grads: FloatArray
    """Backwards for the weights after its last forward."""
    rest_weight_grads: FloatArray
    """Backwards for the weights after its last backward for the input."""
    alternates: BoolArray
    """True where a backward comes before the last forward, [n, ranks]."""


def operations_at_ends(schedule: Schedule, ranks: int, micro_batches: IntArray, chunks: int) -> EndCounts:
    """Count the operations at both ends of each rank's order, for n candidates with `micro_batches`, [n]."""
    # Most candidates of a table share a few numbers of micro-batches.
    distinct, inverse = np.unique(micro_batches, return_inverse=True)
    rank = np.arange(ranks)
    if schedule == "zbv":
        count = distinct.astype(np.float64)[:, None]
        ascending = np.minimum(count, rank + 1)
        lead = np.stack([np.minimum(count, 2 * ranks - 1 - rank), ascending], axis=1)
        tail = np.stack([np.broadcast_to(np.minimum(count, ranks), ascending.shape), ascending], axis=1)
        rest = np.stack(
            [np.clip(count - ranks + 1, 1, rank + 1), np.clip(count - (2 * ranks - 1 - rank), 0, rank)], axis=1
        )
        return EndCounts(lead[inverse], tail[inverse], tail[inverse], rest[inverse], (count > rank + 1)[inverse])
    per_round = micro_batches_per_round(schedule, ranks, distinct, chunks)[:, None]
    forwards = (distinct * chunks)[:, None]
    warmup = warmup_forwards(schedule, ranks, distinct, chunks)

    def by_chunk(number: IntArray) -> FloatArray:
        """The number of forwards of each chunk among a rank's first `number`; likewise of backwards among its last."""
        rounds, remainder = np.divmod(np.minimum(number, forwards), per_round * chunks)
        size = per_round[..., None].astype(np.float64)
        return rounds[:, None] * size + np.clip(remainder[:, None] - np.arange(chunks)[:, None] * size, 0, size)

    lead, weight_grads = by_chunk(warmup + 1), by_chunk(warmup + 1 + rank)
    rest = by_chunk(np.broadcast_to(rank + 1, warmup.shape))
    alternates = forwards - warmup > 1
    return EndCounts(lead[inverse], lead[inverse], weight_grads[inverse], rest[inverse], alternates[inverse])
