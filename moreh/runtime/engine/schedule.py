"""The forward and backward passes of all micro-batches of a batch, in the order of the plan's pipeline schedule."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from moreh.runtime.engine.parallel_model import ParallelModel
from moreh.runtime.pipeline.lean_stage import LeanPipelineStage, Pipeline
from moreh.runtime.sharding.mesh import outgoing, transfer_device
from moreh.runtime.sharding.placement import stage_placements
from moreh.trace import span

_SCHEDULES = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


def run_forward_backward(
    model: ParallelModel, num_micro_batches: int, hidden_shape: tuple[int, int, int]
) -> list[torch.Tensor]:
    """Compute the gradients of the sum of all micro-batches' losses, and leave them on the compute parameters.

    `hidden_shape` is the shape of the hidden states between stages: `[batch, sequence, hidden]`. Returns the loss of
    each micro-batch, a scalar; an empty list on ranks without the last stage.
    """
    if model.plan.pipeline > 1:
        return _run_pipeline(model, num_micro_batches, hidden_shape)
    stage = model.stages[0]
    losses = []
    for index in range(num_micro_batches):
        is_last = index == num_micro_batches - 1
        if model.uses_fsdp:
            _set_fsdp_sync(stage, model, is_last=is_last)
        with span("forward"):
            loss = stage(micro_batch=torch.tensor([index]))
        if is_last:
            # Autocast's cache would keep the bfloat16 copies of all weights. With the cache cleared, the backward pass
            # frees each copy after use.
            torch.clear_autocast_cache()
        with span("backward"):
            loss.backward()
        losses.append(loss.detach())
    return losses


def run_forward(model: ParallelModel, num_micro_batches: int, hidden_shape: tuple[int, int, int]) -> list[torch.Tensor]:
    """The last stage's outputs for all micro-batches, without gradients; an empty list on ranks without that stage.

    A stage that keeps forward passes computes them with gradients.

    torch's `schedule.eval()` is not used for two reasons. A 1F1B schedule needs at least as many micro-batches as
    stages, while an evaluation has as few as possible. And each stage would keep the hidden states of all micro-batches
    until its next step.
    """
    placements = stage_placements(model.plan)
    own_stages = iter(model.stages)
    pipeline_rank = model.mesh.rank("pipeline")
    stages = {p.index: next(own_stages) for p in placements if p.pipeline_rank == pipeline_rank}
    outputs: list[torch.Tensor] = []
    sends: list[tuple[dist.Work | None, torch.Tensor]] = []
    for index in range(num_micro_batches):
        micro_batch = torch.tensor([index])
        hidden: torch.Tensor | None = None
        for number, stage in stages.items():
            keeps = index < stage.kept.count
            if not stage.is_first and placements[number - 1].pipeline_rank != pipeline_rank:
                device = model.mesh.device
                hidden = torch.empty(hidden_shape, dtype=model.dtype, device=transfer_device(device))
                with span("recv_hidden_states", hidden.nbytes):
                    dist.recv(hidden, _peer(model, placements[number - 1].pipeline_rank))
                hidden = hidden.to(device)
                if keeps:
                    stage.kept.received[index] = hidden.requires_grad_()
            with span("forward"), torch.set_grad_enabled(keeps):
                hidden = stage(*(() if stage.is_first else (hidden,)), micro_batch=micro_batch).detach()
            if index == stage.kept.count - 1:
                # Autocast's cache would keep its copies of the weights when their graphs are gone.
                torch.clear_autocast_cache()
            if stage.is_last:
                outputs.append(hidden)
            elif placements[number + 1].pipeline_rank != pipeline_rank:
                hidden = outgoing(hidden)
                # The buffer must live until it has been sent.
                sends.append((dist.isend(hidden, _peer(model, placements[number + 1].pipeline_rank)), hidden))
    with span("send_hidden_states", sum(hidden.nbytes for _, hidden in sends)) if sends else nullcontext():
        for work, _ in sends:
            assert work is not None
            work.wait()
    for module in model.fsdp_modules():
        module.reshard()
    return outputs


def _set_fsdp_sync(stage: nn.Module, model: ParallelModel, *, is_last: bool) -> None:
    """Set FSDP's work after the backward pass of a micro-batch, which depends on the plan's sharding."""
    assert isinstance(stage, FSDPModule)
    stage.set_is_last_backward(is_last)
    stage.set_reshard_after_backward(is_last or model.plan.sharding == "parameters")
    stage.set_requires_gradient_sync(is_last or model.plan.sharding != "optimizer")


def _run_pipeline(
    model: ParallelModel, num_micro_batches: int, hidden_shape: tuple[int, int, int]
) -> list[torch.Tensor]:
    if num_micro_batches not in model.pipelines:
        model.pipelines[num_micro_batches] = _make_pipeline(model, num_micro_batches, hidden_shape)
    pipeline = model.pipelines[num_micro_batches]
    for stage in pipeline.stages:
        stage.hidden_shape = hidden_shape
    indices = torch.arange(num_micro_batches)
    losses: list[torch.Tensor] = []
    pipeline.schedule.step(micro_batch=indices, target=indices, losses=losses, return_outputs=False)
    return [loss.detach() for loss in losses]


def _make_pipeline(model: ParallelModel, num_micro_batches: int, hidden_shape: tuple[int, int, int]) -> Pipeline:
    """torch's schedule for a number of micro-batches. Without the shapes, it would compute once to find them out."""
    mesh, plan, dtype = model.mesh, model.plan, model.dtype
    hidden = torch.empty(hidden_shape, dtype=dtype, device="meta", requires_grad=True)
    loss = torch.empty((), dtype=dtype, device="meta", requires_grad=True)
    placements = [p for p in stage_placements(plan) if p.pipeline_rank == mesh.rank("pipeline")]
    stages = [
        LeanPipelineStage(
            stage,
            placement.index,
            len(plan.stage_layers),
            mesh.device,
            input_args=() if stage.is_first else hidden,
            output_args=loss if stage.is_last else hidden,
            group=mesh.group("pipeline"),
        )
        for stage, placement in zip(model.stages, placements, strict=True)
    ]
    stages_or_stage = stages[0] if plan.schedule == "1f1b" else stages
    # The losses of the micro-batches are divided by the label tokens of the whole batch: their gradients just add up.
    schedule = _SCHEDULES[plan.schedule](
        stages_or_stage, num_micro_batches, loss_fn=lambda output, target: output, scale_grads=False
    )
    return Pipeline(schedule, stages)


def _peer(model: ParallelModel, pipeline_rank: int) -> int:
    """The global rank with this pipeline rank, and with the data-parallel and tensor-parallel rank of this process."""
    return model.mesh.global_rank(pipeline_rank, model.mesh.rank("data"), model.mesh.rank("tensor"))
