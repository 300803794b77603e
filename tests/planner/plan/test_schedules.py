"""The order of a pipeline's operations is torch's own, and the counts that the planner takes from it are right."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from moreh.errors import PlanError
from moreh.planner.plan.plan import SCHEDULES
from moreh.planner.plan.schedules import (
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    SPLIT_BACKWARD,
    Operation,
    check_schedule,
    is_runnable,
    operation_table,
    operations,
    peak_deferred_weight_grads,
    peak_in_flight,
)
from tests.helpers.planner.schedule_cases import runnable_cases

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

    def release_fwd_send_outputs(self, micro_batch: int) -> None:
        """Called since torch 2.15."""


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


def test_order_of_operations_is_that_of_torch(monkeypatch):
    compared = set()
    for schedule, ranks, micro_batches, chunks in runnable_cases(max_ranks=8):
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


def test_combinations_that_torch_refuses_are_refused():
    answers = []
    for schedule in SCHEDULES:
        for ranks in range(1, 6):
            for micro_batches in range(1, 15):
                for chunks in range(1, 4):
                    allowed = accepted(check_schedule, PlanError, schedule, ranks, micro_batches, chunks)
                    arrays = (np.array([number]) for number in (ranks, micro_batches, chunks))
                    assert is_runnable(schedule, *arrays).tolist() == [allowed]
                    if schedule != "1f1b":
                        # This lays out the sends and receives too: torch's own check that no rank waits forever.
                        torch_accepts = accepted(torch_multi_stage, ValueError, schedule, ranks, micro_batches, chunks)
                    else:
                        # Schedule1F1B takes a single stage: there is no way to give it more chunks.
                        stage = RecordingStage(0, ranks)
                        torch_accepts = chunks == 1 and accepted(
                            torch_schedules.Schedule1F1B, ValueError, stage, micro_batches
                        )
                    assert allowed == torch_accepts, (schedule, ranks, micro_batches, chunks)
                    answers.append(allowed)
    assert answers.count(True) > 200
    assert answers.count(False) > 200


@pytest.mark.parametrize(
    ("arguments", "parts"),
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
def test_refusals_say_what_to_do_instead(arguments, parts):
    for call in (check_schedule, operations):
        with pytest.raises(PlanError) as caught:
            call(*arguments)
        assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert not is_runnable(arguments[0], *(np.array([number]) for number in arguments[1:])).any()


def test_micro_batches_that_a_refusal_names_are_allowed():
    # The message about rounds names two numbers of micro-batches; both must be right.
    for ranks in range(1, 9):
        for micro_batches in range(1, 60):
            try:
                check_schedule("interleaved", ranks, micro_batches, 2)
            except PlanError as error:
                named = str(error).split("; use ")[1].split(" micro-batches")[0].split(" or ")
                for number in named:
                    check_schedule("interleaved", ranks, int(number), 2)


def test_peak_of_deferred_weight_gradients_is_that_of_the_order():
    for schedule, ranks, micro_batches, chunks in runnable_cases(max_ranks=7):
        if schedule in SPLIT_BACKWARD:
            kind = operation_table(schedule, ranks, micro_batches, chunks).kind
            deferred = np.cumsum((kind == BACKWARD_INPUT).astype(int) - (kind == BACKWARD_WEIGHT), axis=1).max(axis=1)
            assert peak_deferred_weight_grads(schedule, ranks, micro_batches, chunks).tolist() == deferred.tolist()


def test_peak_in_flight_of_large_pipelines_is_the_closed_form_and_read_only():
    assert peak_in_flight("1f1b", 128, 4096, 1).tolist() == list(range(128, 0, -1))
    assert set(peak_in_flight("zero-bubble", 128, 4096, 1)) == {128}
    assert set(peak_in_flight("zbv", 128, 4096, 2)) == {256}
    with pytest.raises(ValueError, match="read-only"):
        peak_in_flight("1f1b", 128, 4096, 1)[0] = 0
