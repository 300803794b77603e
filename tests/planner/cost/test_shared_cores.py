"""The simulated times of a pipeline whose ranks share CPU cores."""

import numpy as np
import pytest

from moreh.planner.cost.pipeline_time import makespan
from moreh.planner.cost.shared_cores import shared_makespan
from tests.helpers.planner.schedule_cases import equal_stages, random_cases


def test_cores_for_all_ranks_give_the_step_of_ranks_with_cores_of_their_own():
    for case in random_cases(60, seed=3):
        assert shared_makespan(*case, concurrent_ranks=case[1]) == pytest.approx(makespan(*case), rel=1e-9)


def test_ranks_at_work_share_the_cores_evenly():
    """Two ranks on one and a half cores; forward 1 s, backward 2 s, so 4/3 s and 8/3 s while both work."""
    # Rank 0 alone: first forward                        0 to 1
    # both: forwards                                     1 to 7/3
    # rank 1 alone: first backward                         to 13/3
    # both: half a backward beside the last forward        to 17/3
    # both: half a backward beside the other half          to 7
    # rank 1 alone: the rest of the last backward          to 8
    # rank 0 alone: last backward                          to 10
    assert shared_makespan(*equal_stages("1f1b", 2, 2, 1), concurrent_ranks=1.5) == pytest.approx(10)
    assert makespan(*equal_stages("1f1b", 2, 2, 1)) == 9


def test_one_core_is_never_idle():
    for case in random_cases(30, seed=4):
        schedule, ranks, micro_batches, chunks, forward_s, backward_s, weight_fraction, _ = case
        no_sends = schedule, ranks, micro_batches, chunks, forward_s, backward_s, weight_fraction, 0.0
        work = micro_batches * float(np.sum(forward_s + backward_s))
        for cores in (1, 0.5):
            assert shared_makespan(*no_sends, concurrent_ranks=cores) == pytest.approx(work / cores, rel=1e-9)


def test_step_on_fewer_cores_is_within_its_bounds():
    for case in random_cases(60, seed=5):
        ranks, micro_batches, forward_s, backward_s = case[1], case[2], case[4], case[5]
        work = micro_batches * float(np.sum(forward_s + backward_s))
        own_cores = makespan(*case)
        for cores in (0.9 * ranks, 0.5 * ranks, 0.1 * ranks):
            seconds = shared_makespan(*case, concurrent_ranks=cores)
            rounding = 1e-9 * seconds
            assert seconds >= work / cores - rounding
            assert seconds >= own_cores - rounding
            assert seconds <= own_cores * ranks / cores + rounding
