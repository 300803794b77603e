"""Shards a pipeline stage over the data-parallel ranks with torch's fully_shard."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from moreh.planner.plan.plan import Plan
from moreh.runtime.pipeline.lean_stage import finalizes_backward
from moreh.runtime.pipeline.stage import Stage
from moreh.runtime.sharding.mesh import Mesh
from moreh.runtime.tensor.collectives import reduce_scatter


def fully_shard_stage(stage: Stage, plan: Plan, mesh: Mesh) -> None:
    """Let FSDP shard a stage: each layer is one group of parameters, the rest of the stage another."""
    data_mesh = mesh.submesh("data")
    # In a pipeline the schedule gathers parameters once for all micro-batches.
    reshard = plan.sharding == "parameters" and plan.pipeline == 1
    load_hooks = [(module, dict(module._load_state_dict_post_hooks)) for module in stage.modules()]
    for layer in stage.layers:
        fully_shard(layer, mesh=data_mesh, reshard_after_forward=reshard)
    fully_shard(stage, mesh=data_mesh, reshard_after_forward=reshard)
    stage._apply(lambda tensor: torch.empty_like(tensor, device=mesh.device) if tensor.is_meta else tensor)  # type: ignore[no-untyped-call]
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by the number of all label tokens, so gradients are summed and not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_custom_reduce_scatter(_ReduceScatter())
    if plan.pipeline > 1 and finalizes_backward():
        root: Any = stage
        # For good: see LeanPipelineStage.start_gradient_reduction.
        root.set_manual_backward_finalization(True)
    for module, hooks in load_hooks:
        # FSDP's hooks expect its own parameters in the modules, but `load_state_dict` fills the script's.
        module._load_state_dict_post_hooks.clear()
        module._load_state_dict_post_hooks.update(hooks)


class _ReduceScatter(ReduceScatter):
    """Lets FSDP use this package's reduce-scatter, which moves half as many bytes on CPUs."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        if op != dist.ReduceOp.SUM or async_op:
            raise RuntimeError(
                f"FSDP asked for a reduce-scatter with op={op}, async_op={async_op}: this one supports op=SUM, "
                "async_op=False; run with the torch release that this package was tested with"
            )
        reduce_scatter(output_tensor, input_tensor, group, "fsdp_reduce_scatter")
