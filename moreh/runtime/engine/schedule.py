"""The forward and backward passes of all micro-batches of a batch, in the order of the plan's schedule."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from moreh.runtime.engine.parallel_model import ParallelModel
from moreh.runtime.pipeline.lean_stage import LeanPipelineStage, Pipeline
from moreh.runtime.sharding.placement import stage_placements

_SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


def run_forward_backward(
    model: ParallelModel, micro_batches: int, hidden_shape: tuple[int, int, int]
) -> list[torch.Tensor]:
    """Compute the gradients of the sum of all micro-batches' losses; they are left on the computing parameters.

    `hidden_shape` is that of hidden states between stages, `[rows, sequence, hidden]`. Returns the micro-batches' losses,
    none on ranks without the last stage.
    """
    if model.plan.pipeline > 1:
        return _run_pipeline(model, micro_batches, hidden_shape)
    stage = model.stages[0]
    losses = []
    for number in range(micro_batches):
        if model.sharded:
            _set_fsdp_sync(stage, model, is_last=number == micro_batches - 1)
        loss = stage(micro_batch=torch.tensor([number]))
        if number == micro_batches - 1:
            # Autocast would keep its copies of the weights to the end: without it the backward pass frees each after its use.
            torch.clear_autocast_cache()
        loss.backward()
        losses.append(loss.detach())
    return losses


def _set_fsdp_sync(stage: Any, model: ParallelModel, *, is_last: bool) -> None:
    """What FSDP does after the backward pass of a micro-batch, by what the plan shards."""
    assert isinstance(stage, FSDPModule)
    stage.set_is_last_backward(is_last)
    stage.set_reshard_after_backward(is_last or model.plan.sharding == "parameters")
    stage.set_requires_gradient_sync(is_last or model.plan.sharding != "optimizer")


def _run_pipeline(model: ParallelModel, micro_batches: int, hidden_shape: tuple[int, int, int]) -> list[torch.Tensor]:
    if micro_batches not in model.pipelines:
        model.pipelines[micro_batches] = _make_pipeline(model, micro_batches, hidden_shape)
    pipeline = model.pipelines[micro_batches]
    for stage in pipeline.stages:
        stage.hidden_shape = hidden_shape
    numbers = torch.arange(micro_batches)
    losses: list[torch.Tensor] = []
    pipeline.schedule.step(micro_batch=numbers, target=numbers, losses=losses, return_outputs=False)
    return [loss.detach() for loss in losses]


def hidden_dtype(model: ParallelModel) -> torch.dtype:
    """The type of hidden states between stages: that of the weights, also under autocast."""
    return next(iter(model.compute_params.values())).dtype


def _make_pipeline(model: ParallelModel, micro_batches: int, hidden_shape: tuple[int, int, int]) -> Pipeline:
    """The schedule of torch for so many micro-batches. A shape is given, so that none is found out by computing."""
    mesh, plan, dtype = model.mesh, model.plan, hidden_dtype(model)
    hidden = torch.empty(hidden_shape, dtype=dtype, device="meta", requires_grad=True)
    loss = torch.empty((), dtype=dtype, device="meta", requires_grad=True)
    places = [place for place in stage_placements(plan) if place.pipeline_rank == mesh.rank("pipeline")]
    stages = [
        LeanPipelineStage(
            stage,
            place.index,
            len(plan.stage_layers),
            mesh.device,
            input_args=() if stage.is_first else hidden,
            output_args=loss if stage.is_last else hidden,
            group=mesh.group("pipeline"),
        )
        for stage, place in zip(model.stages, places, strict=True)
    ]
    make = _SCHEDULES[plan.schedule]
    stages_or_stage = stages[0] if plan.schedule == "1f1b" else stages
    # The loss is a sum already, divided by all label tokens.
    schedule = make(stages_or_stage, micro_batches, loss_fn=lambda output, target: output, scale_grads=False)
    return Pipeline(schedule, stages)


def forward(
    model: ParallelModel, micro_batches: int, hidden_shape: Callable[[int], tuple[int, ...]], device: torch.device
) -> list[torch.Tensor]:
    """The outputs of the last stage for all micro-batches without gradients, none on ranks without the last stage."""
    places = stage_placements(model.plan)
    own = iter(model.stages)
    stages = {place.index: next(own) for place in places if place.pipeline_rank == model.mesh.rank("pipeline")}
    outputs: list[torch.Tensor] = []
    sent = []
    for number in range(micro_batches):
        index = torch.tensor([number])
        hidden: torch.Tensor | None = None
        for place in places:
            stage = stages.get(place.index)
            if stage is None:
                continue
            if not stage.is_first and places[place.index - 1].pipeline_rank != place.pipeline_rank:
                hidden = torch.empty(hidden_shape(number), dtype=hidden_dtype(model), device=device)
                dist.recv(hidden, _peer(model, places[place.index - 1].pipeline_rank))
            hidden = stage(*(() if stage.is_first else (hidden,)), micro_batch=index)
            if stage.is_last:
                outputs.append(hidden)
            elif places[place.index + 1].pipeline_rank != place.pipeline_rank:
                sent.append(
                    (dist.isend(hidden.contiguous(), _peer(model, places[place.index + 1].pipeline_rank)), hidden)
                )
    for work, _ in sent:
        assert work is not None
        work.wait()
    for module in model.sharded_modules():
        module.reshard()
    return outputs


def _peer(model: ParallelModel, pipeline_rank: int) -> int:
    return model.mesh.global_rank(pipeline_rank, model.mesh.rank("data"), model.mesh.rank("tensor"))
