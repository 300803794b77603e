"""The lower bounds of a pipeline's step time: never above the makespan, and close below it."""

import numpy as np

from moreh.planner.cost.pipeline_bounds import PipelineTable, makespan_lower_bound, operations_at_ends
from moreh.planner.cost.pipeline_time import makespan
from moreh.planner.plan.plan import SCHEDULES
from moreh.planner.plan.schedules import SPLIT_BACKWARD, operations, peak_in_flight
from moreh.planner.plan.stage_layout import rank_to_stages
from tests.helpers.compare import curve_difference
from tests.helpers.planner.schedule_cases import lower_bound, random_cases, runnable_cases


def test_peak_in_flight_and_counts_at_both_ends_are_those_of_the_order():
    for schedule, ranks, micro_batches, chunks in runnable_cases(max_ranks=7):
        peak = peak_in_flight(schedule, ranks, micro_batches, chunks)
        ends = operations_at_ends(schedule, ranks, np.array([micro_batches]), chunks)
        backward, release = ("I", "W") if schedule in SPLIT_BACKWARD else ("B", "B")
        for rank, row in enumerate(operations(schedule, ranks, micro_batches, chunks)):
            held = np.cumsum([(operation.kind == "F") - (operation.kind == release) for operation in row])
            assert (held.max(), held[-1]) == (peak[rank], 0), (schedule, ranks, micro_batches, chunks, rank)

            kinds = [operation.kind for operation in row]
            stages = rank_to_stages(schedule, ranks, chunks)[rank]
            first, last = kinds.index(backward), len(kinds) - 1 - kinds[::-1].index("F")
            end = len(kinds) - 1 - kinds[::-1].index(backward)
            # The lower bounds rest on which stage and micro-batch these are.
            assert row[first] == (backward, stages[-1], 0)
            assert row[last] == ("F", stages[-1], micro_batches - 1)
            assert row[end] == (backward, stages[0], micro_batches - 1)
            assert ends.alternates[0, rank] == (first < last)
            expected = [(row[:first], "F", ends.lead_forwards), (row[last:], backward, ends.tail_backwards)]
            if schedule in SPLIT_BACKWARD:
                expected += [(row[last:], "W", ends.tail_weight_grads), (row[end:], "W", ends.rest_weight_grads)]
            for part, kind, counts in expected:
                actual = [sum(operation[:2] == (kind, stage) for operation in part) for stage in stages]
                assert actual == counts[0, :, rank].tolist(), (schedule, ranks, micro_batches, chunks, rank, kind)


def is_lower_bound(bound_s, makespan_s):
    return bound_s <= makespan_s * (1 + 1e-12)


def is_tight(ratios):
    """Whether bounds, as shares of the makespans, tell something. The limits are a little below what was measured."""
    return np.median(ratios) > 0.99 and np.quantile(ratios, 0.1) > 0.9


def test_no_bound_is_above_the_makespan():
    tightness: dict[str, list[float]] = {schedule: [] for schedule in SCHEDULES}
    for case in random_cases(1200, seed=3):
        seconds, bound = makespan(*case), lower_bound(case)
        assert is_lower_bound(bound, seconds), case
        tightness[case[0]].append(bound / seconds)
    for schedule, ratios in tightness.items():
        assert len(ratios) > 100
        assert is_tight(ratios), (schedule, np.median(ratios), np.quantile(ratios, 0.1))


def test_comparisons_of_bounds_notice_wrong_and_nan_bounds():
    for wrong in (1.01, np.nan):
        assert not is_lower_bound(wrong, 1.0)
    assert not is_lower_bound(1.0, np.nan)
    for wrong in (0.5, np.nan):
        assert not is_tight([wrong, *[1.0] * 7])
    assert is_tight([1.0] * 8)


def test_bounds_of_many_candidates_are_those_of_each_alone():
    rng = np.random.default_rng(4)
    for schedule, ranks, chunks in (
        ("1f1b", 4, 1),
        ("interleaved", 4, 3),
        ("zero-bubble", 5, 2),
        ("zbv", 5, 2),
        ("zbv", 1, 2),
    ):
        micro_batches = rng.choice([ranks, 2 * ranks, 7 * ranks], 20)
        forward_s, backward_s = rng.uniform(0.5, 2, (2, 20, ranks * chunks))
        send_s = rng.choice([0.0, 0.2, 2.0], 20)
        table = PipelineTable(schedule, ranks, chunks, micro_batches, forward_s, backward_s, 0.4, send_s)
        together = makespan_lower_bound(table)
        candidates = zip(micro_batches.tolist(), forward_s, backward_s, send_s.tolist(), strict=True)
        alone = [lower_bound((schedule, ranks, count, chunks, f, b, 0.4, send)) for count, f, b, send in candidates]
        assert curve_difference(together, alone) < 1e-13
