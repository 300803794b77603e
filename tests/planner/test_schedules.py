"""The pipeline schedules: the order is torch's own, and the times follow from it."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from moreh.errors import PlanError
from moreh.planner.cost import pipeline_time
from moreh.planner.cost.pipeline_bounds import makespan_lower_bound, operations_at_ends
from moreh.planner.cost.pipeline_time import makespan, sequence_operations, simulate
from moreh.planner.plan.plan import SCHEDULES, Schedule
from moreh.planner.plan.schedules import (
    OPERATION_KINDS,
    SPLIT_BACKWARD,
    Operation,
    OperationTable,
    check_schedule,
    is_runnable,
    operation_table,
    operations,
    peak_deferred_weight_grads,
    peak_in_flight,
)
from moreh.planner.plan.stage_layout import rank_to_stages

MULTI_STAGE = {
    "interleaved": torch_schedules.ScheduleInterleaved1F1B,
    "zero-bubble": torch_schedules.ScheduleInterleavedZeroBubble,
    "zbv": torch_schedules.ScheduleZBVZeroBubble,
}


class RecordingStage:
    """Stands in for a stage of torch and writes down what a schedule has it compute."""

    def __init__(self, index: int, stages: int) -> None:
        self.stage_index, self.num_stages = index, stages
        self.is_first, self.is_last = index == 0, index == stages - 1
        self.ran: list[Operation] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("get_") and name.endswith("_ops"):
            return lambda micro_batch: []
        raise AttributeError(name)

    def forward_one_chunk(self, micro_batch: int, *args: Any, **kwargs: Any) -> None:
        self.ran.append(Operation("F", self.stage_index, micro_batch))

    def backward_one_chunk(self, micro_batch: int, *args: Any, **kwargs: Any) -> None:
        self.ran.append(Operation("B", self.stage_index, micro_batch))

    def perform_reduce_grad(self, factor: int) -> None:
        pass


def torch_1f1b(ranks: int, micro_batches: int, monkeypatch: pytest.MonkeyPatch) -> tuple[tuple[Operation, ...], ...]:
    # What it runs, because its own _get_pipeline_order names the last rank's micro-batches one too high (torch 2.13).
    monkeypatch.setattr(torch_schedules.Schedule1F1B, "_initialize_stage", lambda *args: None)
    result = []
    for rank in range(ranks):
        stage = RecordingStage(rank, ranks)
        schedule = torch_schedules.Schedule1F1B(stage, micro_batches)
        schedule._step_microbatches([()] * micro_batches, [{}] * micro_batches)
        result.append(tuple(stage.ran))
    return tuple(result)


def torch_multi_stage(
    schedule: str, ranks: int, micro_batches: int, chunks: int
) -> torch_schedules._PipelineScheduleRuntime:
    stages = [
        SimpleNamespace(num_stages=ranks * chunks, group_size=ranks, group_rank=0, stage_index=chunk, submod=None)
        for chunk in range(chunks)
    ]
    return MULTI_STAGE[schedule](stages, micro_batches)


def cases(most_ranks: int, least_ranks: int = 1, most_chunks: int = 4) -> Iterator[tuple[Schedule, int, int, int]]:
    """Schedules, ranks, micro-batches and chunks that torch runs: fewer micro-batches than ranks, odd rounds and many."""
    for schedule in SCHEDULES:
        for ranks in range(least_ranks, most_ranks + 1):
            for micro_batches in sorted(
                {1, 2, ranks - 1, ranks, ranks + 1, 2 * ranks - 1, 2 * ranks, 2 * ranks + 2, 3 * ranks, 23} - {0}
            ):
                for chunks in range(1, most_chunks + 1):
                    if is_runnable(schedule, np.array(ranks), np.array(micro_batches), np.array(chunks)):
                        yield schedule, ranks, micro_batches, chunks


def random_cases(
    count: int, seed: int = 0
) -> Iterator[tuple[Schedule, int, int, int, np.ndarray, np.ndarray, float, float]]:
    """What `simulate` takes, with stages that differ by up to 2 and sends from none to as long as a forward."""
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


def lower_bound(case: tuple[Any, ...]) -> float:
    schedule, ranks, micro_batches, chunks, forward_s, backward_s, weight_fraction, send_s = case
    times = np.asarray(forward_s)[None], np.asarray(backward_s)[None]
    bound = makespan_lower_bound(
        schedule, ranks, np.array([micro_batches]), chunks, *times, weight_fraction, np.array([send_s])
    )
    assert bound.shape == (1,)
    return float(bound[0])


def equal_stages(
    schedule: Schedule, ranks: int, micro_batches: int, chunks: int, send_s: float = 0.0
) -> tuple[Any, ...]:
    """A model that takes 1 second forward and 2 backward on a rank, whatever the number of chunks."""
    stages = ranks * chunks
    return schedule, ranks, micro_batches, chunks, [1 / chunks] * stages, [2 / chunks] * stages, 0.5, send_s


def test_order_is_torchs(monkeypatch):
    compared = set()
    for schedule, ranks, micro_batches, chunks in cases(most_ranks=8):
        ours = operations(schedule, ranks, micro_batches, chunks)
        if schedule == "1f1b":
            assert ours == torch_1f1b(ranks, micro_batches, monkeypatch), (ranks, micro_batches)
        else:
            with monkeypatch.context() as patch:
                # Sends and receives are not compared and take long to lay out.
                patch.setattr(
                    torch_schedules._PipelineScheduleRuntime, "_prepare_schedule_with_comms", lambda *args: None
                )
                theirs = torch_multi_stage(schedule, ranks, micro_batches, chunks).pipeline_order
            assert ours == tuple(
                tuple(
                    Operation(action.computation_type.value, action.stage_index, action.microbatch_index)
                    for action in theirs[rank]
                    if action is not None
                )
                for rank in range(ranks)
            ), (schedule, ranks, micro_batches, chunks)
        compared.add((schedule, ranks))
    assert len(compared) == 4 * 8


def accepted(call: Callable[..., object], error: type[Exception], *args: Any) -> bool:
    try:
        call(*args)
    except error:
        return False
    return True


def test_what_torch_refuses_is_refused():
    answers = []
    for schedule in SCHEDULES:
        for ranks in range(1, 6):
            for micro_batches in range(1, 15):
                for chunks in range(1, 4):
                    allowed = accepted(check_schedule, PlanError, schedule, ranks, micro_batches, chunks)
                    arrays = (np.array([number]) for number in (ranks, micro_batches, chunks))
                    assert is_runnable(schedule, *arrays).tolist() == [allowed]
                    if schedule != "1f1b":
                        # This lays out the sends and receives too: torch's own check that no rank waits for ever.
                        torchs = accepted(torch_multi_stage, ValueError, schedule, ranks, micro_batches, chunks)
                    else:
                        # Schedule1F1B is given a single stage: more chunks cannot even be said.
                        stage = RecordingStage(0, ranks)
                        torchs = chunks == 1 and accepted(
                            torch_schedules.Schedule1F1B, ValueError, stage, micro_batches
                        )
                    assert allowed == torchs, (schedule, ranks, micro_batches, chunks)
                    answers.append(allowed)
    assert answers.count(True) > 200
    assert answers.count(False) > 200


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("1f1b", 4, 3, 1), ["micro_batches=3", "at least 4", "fewer ranks"]),
        (("1f1b", 4, 8, 2), ["chunks=2", "exactly 1", "'interleaved'"]),
        (("interleaved", 4, 11, 2), ["micro_batches=11", "2 equal rounds", "use 10 or 12"]),
        (("zero-bubble", 3, 10, 2), ["micro_batches=10", "3 equal rounds", "use 9 or 12"]),
        (("zbv", 4, 8, 3), ["chunks=3", "exactly 2", "chunks=2"]),
        (("gpipe", 4, 8, 1), ["'gpipe'", "'1f1b'", "'zbv'"]),
        (("1f1b", 0, 8, 1), ["ranks=0", "at least 1"]),
        (("zbv", 2, 0, 2), ["micro_batches=0", "at least 1"]),
        (("interleaved", 2, 4, -1), ["chunks=-1", "at least 1"]),
    ],
)
def test_refusals_say_what_to_do(given, said):
    for call in (check_schedule, operations):
        with pytest.raises(PlanError) as caught:
            call(*given)
        assert all(part in str(caught.value) for part in said), str(caught.value)
    assert not is_runnable(given[0], *(np.array([number]) for number in given[1:])).any()


def test_counts_in_the_named_alternatives_are_allowed():
    # The message about rounds names two numbers of micro-batches; both must be right.
    for ranks in range(1, 9):
        for micro_batches in range(1, 60):
            try:
                check_schedule("interleaved", ranks, micro_batches, 2)
            except PlanError as error:
                named = str(error).split("; use ")[1].split(" micro-batches")[0].split(" or ")
                for number in named:
                    check_schedule("interleaved", ranks, int(number), 2)


def test_weights_that_wait_are_those_of_the_order():
    for schedule, ranks, micro_batches, chunks in cases(most_ranks=7):
        if schedule in SPLIT_BACKWARD:
            rows = operation_table(schedule, ranks, micro_batches, chunks)
            waiting = np.cumsum((rows.kind == 2).astype(int) - (rows.kind == 3), axis=1).max(axis=1)
            assert peak_deferred_weight_grads(schedule, ranks, micro_batches, chunks).tolist() == waiting.tolist()


def test_peak_in_flight_and_both_ends_are_those_of_the_order():
    for schedule, ranks, micro_batches, chunks in cases(most_ranks=7):
        peak = peak_in_flight(schedule, ranks, micro_batches, chunks)
        lead, inputs, weights, rest, alternates = operations_at_ends(schedule, ranks, np.array([micro_batches]), chunks)
        backward, release = ("I", "W") if schedule in SPLIT_BACKWARD else ("B", "B")
        for rank, row in enumerate(operations(schedule, ranks, micro_batches, chunks)):
            held = np.cumsum([(operation.kind == "F") - (operation.kind == release) for operation in row])
            assert (held.max(), held[-1]) == (peak[rank], 0), (schedule, ranks, micro_batches, chunks, rank)

            kinds = [operation.kind for operation in row]
            own = rank_to_stages(schedule, ranks, chunks)[rank]
            first, last = kinds.index(backward), len(kinds) - 1 - kinds[::-1].index("F")
            end = len(kinds) - 1 - kinds[::-1].index(backward)
            # The lower bounds rest on which stage and micro-batch these are.
            assert row[first] == (backward, own[-1], 0)
            assert row[last] == ("F", own[-1], micro_batches - 1)
            assert row[end] == (backward, own[0], micro_batches - 1)
            assert alternates[0, rank] == (first < last)
            expected = [(row[:first], "F", lead), (row[last:], backward, inputs)]
            if schedule in SPLIT_BACKWARD:
                expected += [(row[last:], "W", weights), (row[end:], "W", rest)]
            for part, kind, counts in expected:
                found = [sum(operation[:2] == (kind, stage) for operation in part) for stage in own]
                assert found == counts[0, :, rank].tolist(), (schedule, ranks, micro_batches, chunks, rank, kind)


def test_peak_in_flight_of_large_pipelines():
    assert peak_in_flight("1f1b", 128, 4096, 1).tolist() == list(range(128, 0, -1))
    assert set(peak_in_flight("zero-bubble", 128, 4096, 1)) == {128}
    assert set(peak_in_flight("zbv", 128, 4096, 2)) == {256}
    with pytest.raises(ValueError, match="read-only"):
        peak_in_flight("1f1b", 128, 4096, 1)[0] = 0


def simulated_slowly(case: tuple[Any, ...]) -> dict[Operation, tuple[float, float]]:
    """Start and end of each operation, by rounds over all ranks until nothing changes: an software apart."""
    schedule, ranks, micro_batches, chunks, forward_s, backward_s, weight_fraction, send_s = case
    stages = ranks * chunks
    rank_of = {int(stage): rank for rank, row in enumerate(rank_to_stages(schedule, ranks, chunks)) for stage in row}
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


def test_simulation_agrees_with_a_plain_one():
    seen = set()
    for case in random_cases(60, seed=1):
        timeline, expected = simulate(*case), simulated_slowly(case)
        assert len(timeline.kind) == len(expected)
        columns = (timeline.kind, timeline.stage, timeline.micro_batch, timeline.start_s, timeline.end_s)
        for kind, stage, micro_batch, start, end in zip(*(column.tolist() for column in columns), strict=True):
            assert (start, end) == pytest.approx(
                expected[Operation(OPERATION_KINDS[kind], stage, micro_batch)], rel=1e-12, abs=1e-12
            )
        assert timeline.makespan_s == pytest.approx(max(end for _, end in expected.values()), rel=1e-12)
        assert makespan(*case) == pytest.approx(timeline.makespan_s, rel=1e-12)
        seen.add(case[0])
    assert seen == set(SCHEDULES)


def test_work_is_conserved_and_ranks_never_overlap():
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
def test_an_order_that_contradicts_itself_is_found(schedule):
    chunks = {"1f1b": 1}.get(schedule, 2)
    given = operation_table(schedule, 3, 6, chunks)
    sequence_operations(given, schedule, chunks)
    kinds, release = given.kind[0].tolist(), "I" if schedule in SPLIT_BACKWARD else "B"
    # On the first rank the first forward and its own backward change places.
    backward = next(
        at
        for at, kind in enumerate(kinds)
        if OPERATION_KINDS[kind] == release and given.stage[0, at] == 0 and given.micro_batch[0, at] == 0
    )
    wrong = OperationTable(*(part.copy() for part in given))
    for part in wrong:
        part[0, [0, backward]] = part[0, [backward, 0]]
    with pytest.raises(AssertionError, match=r"deadlock.*operation 0 of rank 0"):
        sequence_operations(wrong, schedule, chunks)


def test_ranks_that_wait_for_each_other_are_found():
    # Rank 1 wants micro-batch 1 first, which rank 0 sends only after micro-batch 0 came back.
    given = OperationTable(*(part.copy() for part in operation_table("1f1b", 2, 2, 1)))
    given.kind[:] = [[0, 1, 0, 1], [0, 1, 0, 1]]
    given.micro_batch[:] = [[0, 0, 1, 1], [1, 1, 0, 0]]
    with pytest.raises(AssertionError, match="deadlock"):
        sequence_operations(given, "1f1b", 1)


def test_closed_forms_for_equal_stages():
    for schedule, ranks, micro_batches, chunks in cases(most_ranks=8):
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


def test_less_bubble_the_more_is_interleaved_and_split():
    for ranks in (2, 4, 8):
        for micro_batches in (ranks, 2 * ranks, 4 * ranks):
            plain = makespan(*equal_stages("1f1b", ranks, micro_batches, 1))
            assert makespan(*equal_stages("zero-bubble", ranks, micro_batches, 1)) <= plain
            for chunks in (2, 4):
                interleaved = makespan(*equal_stages("interleaved", ranks, micro_batches, chunks))
                assert makespan(*equal_stages("zero-bubble", ranks, micro_batches, chunks)) <= interleaved < plain


def test_no_bound_is_above_the_makespan():
    tightness: dict[str, list[float]] = {schedule: [] for schedule in SCHEDULES}
    for case in random_cases(1200, seed=3):
        seconds, bound = makespan(*case), lower_bound(case)
        assert bound <= seconds * (1 + 1e-12), case
        tightness[case[0]].append(bound / seconds)
    # The bounds must tell something: these are a little below what was measured when they were written.
    for schedule, ratios in tightness.items():
        assert len(ratios) > 100
        assert np.median(ratios) > 0.99, (schedule, np.median(ratios))
        assert np.quantile(ratios, 0.1) > 0.9, (schedule, np.quantile(ratios, 0.1))


def test_bounds_of_many_candidates_are_those_of_each():
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
        together = makespan_lower_bound(schedule, ranks, micro_batches, chunks, forward_s, backward_s, 0.4, send_s)
        cases_apart = zip(micro_batches.tolist(), forward_s, backward_s, send_s.tolist(), strict=True)
        apart = [lower_bound((schedule, ranks, number, chunks, f, b, 0.4, send)) for number, f, b, send in cases_apart]
        np.testing.assert_allclose(together, apart, rtol=1e-13)


def test_steady_state_gives_the_makespan_of_the_full_simulation(monkeypatch):
    simulated: list[int] = []

    def counted(linked: pipeline_time.ExecutionSequence, *args: Any) -> list[float]:
        simulated.append(len(linked.source))
        return ends(linked, *args)

    ends = pipeline_time._end_times
    monkeypatch.setattr(pipeline_time, "_end_times", counted)
    rng = np.random.default_rng(5)
    shortened = 0
    for number in range(48):
        schedule = SCHEDULES[number % 4]
        ranks = int(rng.integers(1, 6))
        chunks = {"1f1b": 1, "zbv": 2}.get(schedule) or int(rng.integers(1, 3))
        micro_batches = ranks * int(rng.integers(60, 90))
        stages = ranks * chunks
        # Equal stages with slow sends repeat only after as many micro-batches as there are ranks.
        forward_s = np.ones(stages) if number % 3 else rng.uniform(0.8, 1.2, stages)
        case = schedule, ranks, micro_batches, chunks, forward_s, 2 * forward_s, 0.4, float(rng.choice([0.0, 0.1, 0.7]))
        simulated.clear()
        seconds = makespan(*case)
        most = max(simulated)
        timeline = simulate(*case)
        shortened += most < len(timeline.kind)
        assert seconds == pytest.approx(timeline.makespan_s, rel=1e-9)
        assert lower_bound(case) <= seconds * (1 + 1e-12)
    # Otherwise the comparison above was one of a thing with itself.
    assert shortened > 30


def test_times_that_do_not_fit_the_stages_are_refused():
    with pytest.raises(ValueError, match="4 stages need as many times, but got 3 forward and 4 backward"):
        makespan("interleaved", 2, 4, 2, [1.0] * 3, [1.0] * 4, 0.5, 0.0)


def test_the_planner_starts_without_torch():
    code = "import sys, moreh.planner.cost.pipeline_time, moreh.planner.cost.pipeline_bounds; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"
