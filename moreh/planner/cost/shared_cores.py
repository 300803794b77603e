"""The time of one pipeline step on CPU cores that the ranks share, by simulating the exact order of operations.

A rank that computes while the others wait has a core of its own. With more ranks at work than cores, all of them are
slower, as under the operating system's fair scheduling. So a step may take longer than with a core for each rank, and
longer than the work of all ranks divided by the cores.
"""

from collections.abc import Sequence
from math import inf

from moreh.planner.cost.pipeline_time import execution_sequence, operation_durations
from moreh.planner.plan.plan import Schedule

# Work that is left over by rounding, as a share of the step's seconds so far.
ROUNDING = 1e-12


def shared_makespan(
    schedule: Schedule,
    ranks: int,
    micro_batches: int,
    chunks: int,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    weight_fraction: float,
    send_s: float,
    concurrent_ranks: float,
) -> float:
    """Seconds of one step. The arguments are those of `makespan`, with seconds of a rank that has a core of its own.

    Args:
        concurrent_ranks: Ranks that the cores suffice for. Below 1, a rank of several workers is slow even alone.
    """
    sequence = execution_sequence(schedule, ranks, micro_batches, chunks)
    seconds = operation_durations(schedule, ranks, chunks, forward_s, backward_s, weight_fraction)
    total = len(sequence.source)
    orders = sequence.position.reshape(ranks, -1).tolist()
    length = total // ranks
    # The input that exists from the start comes last.
    ends = [inf] * total + [-inf]
    done, waiting, working = [0] * ranks, set(range(ranks)), dict[int, float]()
    now = 0.0
    while waiting or working:
        arrival = inf
        for rank in sorted(waiting):
            operation = orders[rank][done[rank]]
            ready = ends[sequence.source[operation]] + send_s
            if ready <= now:
                working[rank] = seconds[sequence.duration[operation]]
                waiting.remove(rank)
            else:
                arrival = min(arrival, ready)
        rate = min(1.0, concurrent_ranks / len(working)) if working else 1.0
        elapsed = min(min(working.values(), default=inf) / rate, arrival - now)
        assert elapsed < inf, "deadlock: all ranks wait for each other"
        # Not the sum, which may round to before the arrival.
        now = arrival if elapsed == arrival - now else now + elapsed
        for rank, left in list(working.items()):
            left -= elapsed * rate
            if left > ROUNDING * now:
                working[rank] = left
                continue
            ends[orders[rank][done[rank]]] = now
            done[rank] += 1
            del working[rank]
            if done[rank] < length:
                waiting.add(rank)
    return now
