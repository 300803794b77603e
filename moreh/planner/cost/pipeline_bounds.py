"""Lower bounds of the time of one pipeline step, for many candidates at once and without simulation."""

import numpy as np
from numpy.typing import NDArray

from moreh.planner.plan.arrays import Floats, Integers
from moreh.planner.plan.plan import Schedule
from moreh.planner.plan.schedules import SPLIT_BACKWARD, micro_batches_per_round, stages_of_ranks, warmup_forwards


def makespan_lower_bound(
    schedule: Schedule,
    ranks: int,
    micro_batches: Integers,
    chunks: int,
    forward_s: Floats,
    backward_s: Floats,
    weight_fraction: float | Floats,
    send_s: Floats,
) -> Floats:
    """Seconds that one step takes at least, for n candidates at once, [n]: never more than their `makespan`.

    Each bound is the length of a path of operations that wait for each other: through one micro-batch alone; for each rank,
    to its first operation, through all its work, and from its last one back to the first stage; and the same with the
    first and the last micro-batch's way to the end of the model and back in place of the rank's work meanwhile.
    For equal stages and no time to send this gives the makespan of 1F1B, (micro_batches + ranks - 1)(forward + backward), and
    of interleaved 1F1B (https://arxiv.org/abs/2104.04473, section 2.2). Without check of what torch refuses.

    Args:
        micro_batches: [n].
        forward_s: [n, ranks * chunks], as in `simulate`.
        backward_s: [n, ranks * chunks].
        weight_fraction: As in `simulate`, or [n, 1].
        send_s: [n].
    """
    stages, count = stages_of_ranks(schedule, ranks, chunks), ranks * chunks
    split = schedule in SPLIT_BACKWARD
    input_s = backward_s * (1 - weight_fraction) if split else backward_s
    weight_s = backward_s - input_s
    lead, tail_inputs, tail_weights, rest_weights, alternates = _ends_of_ranks(schedule, ranks, micro_batches, chunks)

    # The way of one micro-batch: seconds before its forward of each stage (down), and from the end of the last stage's
    # forward to the end of its backward of each stage (up), both [n, stages].
    hops = np.zeros(count)
    if ranks > 1:
        rank_of = np.empty(count)
        rank_of[stages] = np.arange(ranks)[:, None]
        hops[1:] = np.cumsum(np.diff(rank_of) != 0)
    sends = send_s[:, None] * hops
    passed = np.cumsum(forward_s, axis=1) + sends
    down = passed - forward_s
    up = np.cumsum(input_s[:, ::-1], axis=1)[:, ::-1] + (sends[:, -1:] - sends)

    def work(times: Floats, number: Floats | None = None) -> Floats:
        by_chunk = times[:, stages.T] if schedule == "zbv" else times.reshape(-1, chunks, ranks)
        return np.sum(by_chunk if number is None else by_chunk * number, axis=1)

    low, high = stages[:, 0], stages[:, -1]
    after = work(weight_s, rest_weights) if split else np.zeros((len(up), ranks))
    # From the end of the last backward of a rank: on to the first stage, or only to some rank that still has weights to do.
    returned = up[:, low]
    finish = np.maximum.accumulate(after + returned, axis=1) - returned
    last_way = np.max(returned + after, axis=1)[:, None]

    total = micro_batches[:, None] * work(forward_s + backward_s)
    begin = down[:, low]
    lead_work = work(forward_s, lead) + input_s[:, high]
    tail_work = forward_s[:, high] + work(input_s, tail_inputs)
    if split:
        tail_work += work(weight_s, tail_weights)
    # The end of the first backward, and the time from the start of the last forward.
    first = np.maximum(begin + lead_work, passed[:, -1:] + up[:, high])
    last = np.maximum(tail_work - after + finish, passed[:, -1:] - down[:, high] + last_way)
    bounds = np.maximum(
        np.maximum(begin + total, first + (total - lead_work)) - after + finish, begin + total - tail_work + last
    )
    both = first + (total - lead_work - tail_work) + last
    if schedule != "zbv":
        both += _round_trips(schedule, ranks, micro_batches, chunks, forward_s, input_s, weight_s, send_s)
    bounds = np.where(alternates, np.maximum(bounds, both), bounds)
    return np.maximum(bounds.max(axis=1), passed[:, -1] + last_way[:, 0])


def _round_trips(
    schedule: Schedule,
    ranks: int,
    micro_batches: Integers,
    chunks: int,
    forward_s: Floats,
    input_s: Floats,
    weight_s: Floats,
    send_s: Floats,
) -> Floats:
    """By how much slow sends lengthen the part in which a rank alternates, at least, beyond the rank's work, [n, ranks].

    A rank's forward in slot i reaches the rank d further on in slot i + d (2d in "interleaved", which has as many more
    forwards before it alternates), where a backward follows and comes back in that slot. Where this round trip takes longer
    than the rank's own work in these slots, the rank must wait.
    """
    trips: Floats = np.zeros((len(micro_batches), ranks))
    per_hop = 2 if schedule == "interleaved" else 1
    # Without the slots of the first backward and the last forward.
    slots = np.maximum(
        0.0, (micro_batches * chunks)[:, None] - warmup_forwards(schedule, ranks, micro_batches, chunks) - 2
    )
    by_chunk = (len(micro_batches), chunks, ranks)
    forward, backward, weight = (times.reshape(by_chunk) for times in (forward_s, input_s, weight_s))
    slot_work, slot_weight = forward.max(axis=1) + backward.max(axis=1), weight.max(axis=1)
    none = np.zeros((len(micro_batches), chunks, 1))
    forward, backward = (np.concatenate([none, np.cumsum(times, axis=2)], axis=2) for times in (forward, backward))
    # Any distance gives a bound; these few come close to the best of all.
    for distance in sorted({ranks - 1, *(2**power for power in range(ranks.bit_length()))}):
        if not 0 < distance < ranks:
            continue
        size = per_hop * distance + 1
        near = ranks - distance
        # The chunk that a slot is about differs; the quickest holds for all.
        way = sum((times[:, :, distance + 1 :] - times[:, :, :near]).min(axis=1) for times in (forward, backward))
        own = size * slot_work[:, :near] + (size - 1) * slot_weight[:, :near]
        gain = way + 2 * distance * send_s[:, None] - own
        trips[:, :near] = np.maximum(trips[:, :near], np.floor(slots[:, :near] / size) * gain)
    return trips


def _ends_of_ranks(
    schedule: Schedule, ranks: int, micro_batches: Integers, chunks: int
) -> tuple[Floats, Floats, Floats, Floats, NDArray[np.bool_]]:
    """How many operations of each chunk, [n, chunks, ranks], a rank has at both ends of its order.

    Forwards before its first backward; backwards, and backwards for the weights, after its last forward; backwards for the
    weights after its last backward for the input; and, [n, ranks], whether a backward comes before the last forward.
    """
    # The candidates of a group mostly share a few numbers of micro-batches.
    different, inverse = np.unique(micro_batches, return_inverse=True)
    rank = np.arange(ranks)
    if schedule == "zbv":
        few = different.astype(np.float64)[:, None]
        ascending = np.minimum(few, rank + 1)
        lead = np.stack([np.minimum(few, 2 * ranks - 1 - rank), ascending], axis=1)
        tail = np.stack([np.broadcast_to(np.minimum(few, ranks), ascending.shape), ascending], axis=1)
        rest = np.stack([np.clip(few - ranks + 1, 1, rank + 1), np.clip(few - (2 * ranks - 1 - rank), 0, rank)], axis=1)
        return lead[inverse], tail[inverse], tail[inverse], rest[inverse], (few > rank + 1)[inverse]
    per_round = micro_batches_per_round(schedule, ranks, different, chunks)[:, None]
    count = (different * chunks)[:, None]
    warmup = warmup_forwards(schedule, ranks, different, chunks)

    def first(number: Integers) -> Floats:
        # The first so many forwards of a rank, and as well its last so many backwards, by chunk.
        rounds, left = np.divmod(np.minimum(number, count), per_round * chunks)
        size = per_round[..., None].astype(np.float64)
        return rounds[:, None] * size + np.clip(left[:, None] - np.arange(chunks)[:, None] * size, 0, size)

    lead, weights = first(warmup + 1), first(warmup + 1 + rank)
    rest = first(np.broadcast_to(rank + 1, warmup.shape))
    return lead[inverse], lead[inverse], weights[inverse], rest[inverse], (count - warmup > 1)[inverse]
