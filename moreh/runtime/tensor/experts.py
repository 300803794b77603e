"""Experts under tensor parallelism: each rank has some whole experts, and all tokens.

The router is computed by every rank. An index of an expert that another rank has becomes one beyond this rank's last,
with weight 0: transformers' kernels skip it. The ranks sum what their experts add to each token. So the gradients of
the hidden states and of the weights, of which each rank has the part of its own experts, are summed as well.
"""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moreh.errors import PlanError
from moreh.models.families.tp_blocks import Experts
from moreh.runtime.sharding.spec import TPSplit, shard_range
from moreh.runtime.tensor.collectives import copy_to_tp, gather_from_sp, reduce_from_tp, reduce_scatter_to_sp

_TOKEN_DIM = 0


def experts_of(layer: nn.Module, experts: Experts | None) -> Any:
    """The experts of a layer; None if it has none."""
    if experts is None:
        return None
    try:
        return layer.get_submodule(experts.module)
    except AttributeError:
        return None  # a dense layer


def split_experts(layer: nn.Module, experts: Experts, size: int) -> dict[int, TPSplit]:
    """The split of the parameters of a layer's experts over `size` ranks, by id; empty for a layer without experts.

    Raises:
        PlanError: a rank would have no expert, or they are not in stacked parameters.
    """
    module = experts_of(layer, experts)
    if module is None:
        return {}
    count = module.num_experts
    first, end = shard_range(count, size, size - 1)
    if first == end:
        raise PlanError(
            f"{type(module).__name__} has {count} experts, of which {size} tensor-parallel ranks cannot each have "
            "some: use fewer ranks"
        )
    parameters = dict(module.named_parameters())
    misfits = [name for name, parameter in parameters.items() if parameter.shape[:1] != (count,)]
    if misfits or not parameters:
        raise PlanError(
            f"{type(module).__name__} does not stack its {count} experts in its parameters: use tensor parallelism of "
            "size 1"
        )
    return {id(parameter): TPSplit(0, (count,)) for parameter in parameters.values()}


def whole_parameters(layer: nn.Module, experts: Experts | None, whole: Iterable[str]) -> set[int]:
    """The ids of a layer's parameters that every rank has and uses whole: of its router and gate, and of `whole`."""
    names = [*whole]
    if experts is not None and experts_of(layer, experts) is not None:
        names += [name for name in (experts.router, experts.shared_expert_gate) if name is not None]
    return {id(parameter) for name in names for parameter in layer.get_submodule(name).parameters()}


def install_experts(layer: nn.Module, experts: Experts | None, group: dist.ProcessGroup, state: Any) -> None:
    """Let the experts of a layer compute with the experts that this rank has; nothing for a layer without experts.

    `state` says whether ranks split sequences.
    """
    module = experts_of(layer, experts)
    if experts is None or module is None:
        return
    first, end = shard_range(module.num_experts, group.size(), group.rank())
    module.num_experts = end - first
    # What transformers' kernels look at.
    module._is_expert_parallel = True
    in_eager_mode = module.config._experts_implementation == "eager" if hasattr(module, "config") else True
    # Where eager code does not skip others, the first expert computes such a token, with weight 0.
    others = 0 if in_eager_mode and not _skips_others(module) else end - first

    def enter(called: nn.Module, args: Any) -> Any:
        hidden_states, index, weights = args
        if state.sequence_parallel:
            hidden_states, weights = (gather_from_sp(part, _TOKEN_DIM, group) for part in (hidden_states, weights))
            index = gather_from_sp(index, _TOKEN_DIM, group)
        else:
            hidden_states, weights = copy_to_tp(hidden_states, group), copy_to_tp(weights, group)
        is_own = (index >= first) & (index < end)
        return hidden_states, (index - first).where(is_own, others), weights.where(is_own, 0)

    def leave(called: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        # Eager code skips experts without tokens. If these are all of this rank's experts, it has a gradient
        # of 0 all the same, as on one process, and takes part in the sums over the ranks.
        if in_eager_mode and not (args[1] < module.num_experts).any():
            for tensor in (*called.parameters(), args[0], args[2]):
                output = output + tensor.flatten()[:0].sum()
        if state.sequence_parallel:
            return reduce_scatter_to_sp(output, _TOKEN_DIM, group)
        return reduce_from_tp(output, group)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _skips_others(experts: nn.Module) -> bool:
    """True if the eager code of experts skips an index beyond the last one; that of transformers 5.17 fails."""
    try:
        source = inspect.getsource(inspect.unwrap(type(experts).forward))
    except OSError:
        return False
    return "self.num_experts + 1" in source
