"""The mapping of stages to pipeline ranks, shared by planner and runtime.

Stages are numbered in the model's order, 0 to ranks * chunks - 1. The maps are those of torch.distributed.pipelining.
"""

import numpy as np

from moreh.planner.plan.arrays import IntArray
from moreh.planner.plan.plan import Schedule


def stage_to_rank(schedule: Schedule, ranks: int, chunks: int) -> IntArray:
    """The pipeline rank that holds each stage, [ranks * chunks].

    "zbv" folds the model into a V: rank r holds the stages r and 2 * ranks - 1 - r. The other schedules loop over the
    ranks: stage s is on rank s % ranks.

    >>> stage_to_rank("zbv", 3, 2), stage_to_rank("interleaved", 3, 2)
    (array([0, 1, 2, 2, 1, 0]), array([0, 1, 2, 0, 1, 2]))
    """
    stages = np.arange(ranks * chunks)
    if schedule == "zbv":
        return np.minimum(stages, stages[::-1])
    return stages % ranks


def rank_to_stages(schedule: Schedule, ranks: int, chunks: int) -> IntArray:
    """The stages that each pipeline rank holds, [ranks, chunks], ascending within a rank.

    >>> rank_to_stages("zbv", 3, 2)
    array([[0, 5],
           [1, 4],
           [2, 3]])
    """
    return np.argsort(stage_to_rank(schedule, ranks, chunks), kind="stable").reshape(ranks, chunks)
