"""Cases of the tests of pipeline schedules: schedules that torch runs, and stages with times."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from moreh.planner.cost.pipeline_bounds import PipelineTable, makespan_lower_bound
from moreh.planner.plan.plan import SCHEDULES, Schedule
from moreh.planner.plan.schedules import is_runnable


def runnable_cases(max_ranks: int, min_ranks: int = 1, max_chunks: int = 4) -> Iterator[tuple[Schedule, int, int, int]]:
    """Schedules, ranks, micro-batches and chunks that torch runs: few micro-batches, odd rounds and many."""
    for schedule in SCHEDULES:
        for ranks in range(min_ranks, max_ranks + 1):
            for micro_batches in sorted(
                {1, 2, ranks - 1, ranks, ranks + 1, 2 * ranks - 1, 2 * ranks, 2 * ranks + 2, 3 * ranks, 23} - {0}
            ):
                for chunks in range(1, max_chunks + 1):
                    if is_runnable(schedule, np.array(ranks), np.array(micro_batches), np.array(chunks)):
                        yield schedule, ranks, micro_batches, chunks


def random_cases(
    count: int, seed: int = 0
) -> Iterator[tuple[Schedule, int, int, int, np.ndarray, np.ndarray, float, float]]:
    """Arguments of `simulate`, with stages that differ by up to 2 and sends from none to as long as a forward."""
    rng = np.random.default_rng(seed)
    while count:
        schedule, ranks = SCHEDULES[int(rng.integers(4))], int(rng.integers(1, 9))
        micro_batches = int(rng.integers(1, 50))
        chunks = {"1f1b": 1, "zbv": 2}.get(schedule) or int(rng.integers(1, 5))
        if not is_runnable(schedule, np.array(ranks), np.array(micro_batches), np.array(chunks)):
            continue
        stages = ranks * chunks
        forward_s = rng.uniform(0.7, 1.4, stages)
        backward_s = 2 * forward_s if rng.random() < 0.5 else rng.uniform(1.4, 2.8, stages)
        send_s = float(rng.choice([0.0, 0.02, 0.1, 0.3, 1.0]))
        yield schedule, ranks, micro_batches, chunks, forward_s, backward_s, float(rng.uniform(0.3, 0.6)), send_s
        count -= 1


def equal_stages(
    schedule: Schedule, ranks: int, micro_batches: int, chunks: int, send_s: float = 0.0
) -> tuple[Any, ...]:
    """Arguments of `simulate` for a model that takes a rank 1 second forward and 2 backward, whatever the chunks."""
    stages = ranks * chunks
    return schedule, ranks, micro_batches, chunks, [1 / chunks] * stages, [2 / chunks] * stages, 0.5, send_s


def lower_bound(case: tuple[Any, ...]) -> float:
    """The lower bound of one candidate, given as arguments of `simulate`."""
    schedule, ranks, micro_batches, chunks, forward_s, backward_s, weight_fraction, send_s = case
    times = np.asarray(forward_s)[None], np.asarray(backward_s)[None]
    count, sends = np.array([micro_batches]), np.array([send_s])
    bound = makespan_lower_bound(PipelineTable(schedule, ranks, chunks, count, *times, weight_fraction, sends))
    assert bound.shape == (1,)
    return float(bound[0])
