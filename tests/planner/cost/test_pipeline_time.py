"""The simulated times of a pipeline follow from the order of its operations."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from moreh.planner.cost import pipeline_time
from moreh.planner.cost.pipeline_time import makespan, sequence_operations, simulate
from moreh.planner.plan.plan import SCHEDULES
from moreh.planner.plan.schedules import (
    FORWARD,
    FULL_BACKWARD,
    OPERATION_KINDS,
    SPLIT_BACKWARD,
    Operation,
    OperationTable,
    operation_table,
    operations,
)
from moreh.planner.plan.stage_layout import stage_to_rank
from tests.helpers.compare import worst
from tests.helpers.planner.schedule_cases import equal_stages, lower_bound, random_cases, runnable_cases


def simulated_slowly(case: tuple[Any, ...]) -> dict[Operation, tuple[float, float]]:
    """Start and end of each operation, by rounds over all ranks until nothing changes: independent of `simulate`."""
    schedule, ranks, micro_batches, chunks, forward_s, backward_s, weight_fraction, send_s = case
    stages = ranks * chunks
    rank_of = stage_to_rank(schedule, ranks, chunks)
    backward = "I" if schedule in SPLIT_BACKWARD else "B"
    share = {"F": 0.0, "B": 1.0, "I": 1 - weight_fraction, "W": weight_fraction}
    times: dict[Operation, tuple[float, float]] = {}
    rows = [list(row) for row in operations(schedule, ranks, micro_batches, chunks)]
    free = [0.0] * ranks
    while any(rows):
        for rank, row in enumerate(rows):
            while row:
                kind, stage, micro_batch = row[0]
                if kind == "F":
                    source = Operation("F", stage - 1, micro_batch) if stage else None
                elif kind == "W":
                    source = Operation("I", stage, micro_batch)
                else:
                    source = Operation(*((backward, stage + 1) if stage + 1 < stages else ("F", stage)), micro_batch)
                if source is not None and source not in times:
                    break
                arrival = 0.0 if source is None else times[source][1] + send_s * (rank_of[source.stage] != rank)
                start = max(free[rank], arrival)
                seconds = forward_s[stage] if kind == "F" else backward_s[stage] * share[kind]
                times[row.pop(0)] = start, start + seconds
                free[rank] = start + seconds
    return times


def test_simulation_agrees_with_an_independent_slow_one():
    seen = set()
    for case in random_cases(60, seed=1):
        timeline, expected = simulate(*case), simulated_slowly(case)
        assert len(timeline.kind) == len(expected)
        columns = (timeline.kind, timeline.stage, timeline.micro_batch, timeline.start_s, timeline.end_s)
        for kind, stage, micro_batch, start, end in zip(*(column.tolist() for column in columns), strict=True):
            assert (start, end) == pytest.approx(
                expected[Operation(OPERATION_KINDS[kind], stage, micro_batch)], rel=1e-12, abs=1e-12
            )
        assert timeline.makespan_s == pytest.approx(worst(end for _, end in expected.values()), rel=1e-12)
        assert makespan(*case) == pytest.approx(timeline.makespan_s, rel=1e-12)
        seen.add(case[0])
    assert seen == set(SCHEDULES)


def test_work_is_conserved_and_no_rank_does_two_operations_at_once():
    for case in random_cases(100, seed=2):
        ranks, micro_batches, forward_s, backward_s = case[1], case[2], case[4], case[5]
        timeline = simulate(*case)
        assert timeline.busy_s.sum() == pytest.approx(micro_batches * (forward_s + backward_s).sum(), rel=1e-12)
        assert timeline.busy_s.max() <= timeline.makespan_s * (1 + 1e-12)
        for rank in range(ranks):
            own = timeline.rank == rank
            assert np.all(timeline.start_s[own][1:] >= timeline.end_s[own][:-1])
            assert (timeline.end_s - timeline.start_s)[own].sum() == pytest.approx(timeline.busy_s[rank], rel=1e-9)
            assert timeline.start_s[own][0] >= 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_order_that_contradicts_itself_is_a_deadlock(schedule):
    chunks = {"1f1b": 1}.get(schedule, 2)
    table = operation_table(schedule, 3, 6, chunks)
    sequence_operations(table, schedule, chunks)
    kinds, release = table.kind[0].tolist(), "I" if schedule in SPLIT_BACKWARD else "B"
    # On rank 0, swap the first forward and its own backward.
    backward = next(
        index
        for index, kind in enumerate(kinds)
        if OPERATION_KINDS[kind] == release and table.stage[0, index] == 0 and table.micro_batch[0, index] == 0
    )
    wrong = OperationTable(*(column.copy() for column in table))
    for column in wrong:
        column[0, [0, backward]] = column[0, [backward, 0]]
    with pytest.raises(AssertionError, match=r"deadlock.*operation 0 of rank 0"):
        sequence_operations(wrong, schedule, chunks)


def test_ranks_that_wait_for_each_other_are_a_deadlock():
    # Rank 1 wants micro-batch 1 first, which rank 0 sends only after micro-batch 0 came back.
    table = OperationTable(*(column.copy() for column in operation_table("1f1b", 2, 2, 1)))
    table.kind[:] = [FORWARD, FULL_BACKWARD, FORWARD, FULL_BACKWARD]
    table.micro_batch[:] = [[0, 0, 1, 1], [1, 1, 0, 0]]
    with pytest.raises(AssertionError, match="deadlock"):
        sequence_operations(table, "1f1b", 1)


def test_makespan_of_equal_stages_is_the_closed_form():
    for schedule, ranks, micro_batches, chunks in runnable_cases(max_ranks=8):
        case = equal_stages(schedule, ranks, micro_batches, chunks)
        seconds = makespan(*case)
        if schedule == "1f1b":
            assert seconds == pytest.approx((micro_batches + ranks - 1) * 3, rel=1e-12)
            idle = seconds - simulate(*case).busy_s
            assert idle / seconds == pytest.approx((ranks - 1) / (micro_batches + ranks - 1), rel=1e-9)
            assert lower_bound(case) == pytest.approx(seconds, rel=1e-12)
        elif schedule == "interleaved" and micro_batches % ranks == 0:
            # Narayanan et al. 2021, section 2.2: chunks divide the bubble.
            assert seconds == pytest.approx(3 * micro_batches + 3 * (ranks - 1) / chunks, rel=1e-12)
            assert lower_bound(case) == pytest.approx(seconds, rel=1e-12)
        elif schedule == "zbv" and micro_batches >= 2 * ranks:
            # Forward, backward for the input and for the weights take the same here: only filling is left.
            assert seconds == pytest.approx(3 * micro_batches + (ranks - 1) / 2, rel=1e-12)


def test_interleaving_and_splitting_the_backward_shrink_the_bubble():
    for ranks in (2, 4, 8):
        for micro_batches in (ranks, 2 * ranks, 4 * ranks):
            plain = makespan(*equal_stages("1f1b", ranks, micro_batches, 1))
            assert makespan(*equal_stages("zero-bubble", ranks, micro_batches, 1)) <= plain
            for chunks in (2, 4):
                interleaved = makespan(*equal_stages("interleaved", ranks, micro_batches, chunks))
                assert makespan(*equal_stages("zero-bubble", ranks, micro_batches, chunks)) <= interleaved < plain


def test_steady_state_gives_the_makespan_of_the_full_simulation(monkeypatch):
    simulated: list[int] = []

    def counting_end_times(sequence: pipeline_time.ExecutionSequence, *args: Any) -> list[float]:
        simulated.append(len(sequence.source))
        return end_times(sequence, *args)

    end_times = pipeline_time._end_times
    monkeypatch.setattr(pipeline_time, "_end_times", counting_end_times)
    rng = np.random.default_rng(5)
    shortened = 0
    for index in range(48):
        schedule = SCHEDULES[index % 4]
        ranks = int(rng.integers(1, 6))
        chunks = {"1f1b": 1, "zbv": 2}.get(schedule) or int(rng.integers(1, 3))
        micro_batches = ranks * int(rng.integers(60, 90))
        stages = ranks * chunks
        # Equal stages with slow sends repeat only after as many micro-batches as there are ranks.
        forward_s = np.ones(stages) if index % 3 else rng.uniform(0.8, 1.2, stages)
        case = schedule, ranks, micro_batches, chunks, forward_s, 2 * forward_s, 0.4, float(rng.choice([0.0, 0.1, 0.7]))
        simulated.clear()
        seconds = makespan(*case)
        longest = max(simulated)
        timeline = simulate(*case)
        shortened += longest < len(timeline.kind)
        assert seconds == pytest.approx(timeline.makespan_s, rel=1e-9)
        assert lower_bound(case) <= seconds * (1 + 1e-12)
    # Otherwise the comparison above compares the full simulation with itself.
    assert shortened > 30


def test_times_for_another_number_of_stages_are_refused():
    with pytest.raises(ValueError, match="4 stages need as many times, but got 3 forward and 4 backward"):
        makespan("interleaved", 2, 4, 2, [1.0] * 3, [1.0] * 4, 0.5, 0.0)


def test_planner_starts_without_torch():
    modules = "moreh.planner.search.search, moreh.planner.report.printing"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"
