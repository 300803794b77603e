"""torch's fused Adam kernels in the optimizers of the script: the same arithmetic in one pass over each parameter.

On CPUs these kernels walk through memory and ignore strides. So each step looks at the tensors that it will use, and
takes the kernels only where a parameter, its gradient and its state lie in memory alike. The setting `fused` is
switched on for that time only: state dicts, and what a script reads of an optimizer, are as in plain torch.
"""

import functools
import weakref
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from moreh.log import logger

_FUSED_OPTIMIZERS = (torch.optim.Adam, torch.optim.AdamW)
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
_dtype, _device = attrgetter("dtype"), attrgetter("device")


def use_fused_kernels(optimizer: torch.optim.Optimizer) -> None:
    """Let an Adam or AdamW take its fused implementation in each step that it is the same for.

    Groups for which the script has chosen an implementation keep that.
    """
    if type(optimizer) not in _FUSED_OPTIMIZERS or "_init_group" in vars(optimizer):
        return
    steps = _FusedSteps(optimizer)
    # It collects the tensors of a group, after closures and hooks and right before the kernels. In the instance, it is
    # neither pickled nor copied with the optimizer.
    vars(optimizer)["_init_group"] = steps.collect
    optimizer.register_step_post_hook(steps.end)


class _FusedSteps:
    """The steps of one optimizer: the groups that compute with the fused kernels now."""

    def __init__(self, optimizer: Any) -> None:
        # Only weakly: an optimizer that the script drops must free its state at once.
        self._collect = functools.partial(type(optimizer)._init_group, weakref.proxy(optimizer))
        self._fused_groups: list[dict[str, Any]] = []
        self._has_logged = False

    def collect(self, group: dict[str, Any], params: list[torch.Tensor], *others: list[torch.Tensor]) -> Any:
        """Append the group's tensors to the lists, as torch does, and switch its kernels."""
        # A step that an error has ended has left its groups switched.
        self.end()
        first = next(iter(group["params"]), None)
        if first is None or not _is_open(group) or torch.compiler.is_compiling():
            return self._collect(group, params, *others)
        # Other devices than the CPU count fused steps in their own memory.
        if not first.is_cpu and first.device.type in _get_fused_kernels_supported_devices():
            self._switch(group)
            _move_step_counts(self._collect.args[0].state, group["params"])
        has_complex = self._collect(group, params, *others)
        if _lie_alike(params, *others):
            self._switch(group)
            return has_complex
        self.end()
        if not self._has_logged:
            self._has_logged = True
            logger.info(
                "%s uses torch's default kernels where a parameter, its gradient and its state differ in strides or "
                "dtype, because the fused kernels need equal ones.",
                self._collect.args[0].__class__.__name__,
            )
        return has_complex

    def end(self, *_: Any) -> None:
        """Switch the kernels of all groups back to the script's choice."""
        for group in self._fused_groups:
            group["fused"] = None
        self._fused_groups.clear()

    def _switch(self, group: dict[str, Any]) -> None:
        group["fused"] = True
        self._fused_groups.append(group)


def _move_step_counts(state: Any, params: Sequence[torch.Tensor]) -> None:
    """Move counts of steps to their parameters' device: of a checkpoint that was loaded they are in the CPU's memory.

    Else the steps after it would be rounded as those of torch's other kernels, and would not repeat those of a run that
    was never stopped.
    """
    for param in params:
        step = state[param].get("step") if param in state else None
        if isinstance(step, torch.Tensor) and step.is_cpu:
            state[param]["step"] = step.to(param.device, non_blocking=True)


def _is_open(group: dict[str, Any]) -> bool:
    """True if the script leaves a group's implementation to torch."""
    return not (
        group["foreach"] is not None or group["fused"] is not None or group["capturable"] or group["differentiable"]
    )


def _lie_alike(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    max_exp_avg_sqs: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
) -> bool:
    """True if the fused kernels compute the same: the tensors of each parameter have one layout, type and device."""
    lists = [params, grads, exp_avgs, exp_avg_sqs, *([max_exp_avg_sqs] if max_exp_avg_sqs else [])]
    dtypes = [parameter.dtype for parameter in params]
    if not all(dtype.is_floating_point for dtype in set(dtypes)):
        return False
    if any(step.dtype != torch.float32 for step in steps):
        return False
    if any(list(map(_dtype, each)) != dtypes for each in lists[1:]):
        return False
    if list(map(_device, steps)) != list(map(_device, params)):
        return False
    if not all(type(tensor) in _PLAIN_TENSORS for each in lists for tensor in each):
        lists = [[_local(tensor) for tensor in each] for each in lists]
    if not all(map(torch.Tensor.is_contiguous, chain.from_iterable(lists))):
        strides = [tensor.stride() for tensor in lists[0]]
        if any([tensor.stride() for tensor in each] != strides for each in lists[1:]):
            return False
        if not all(_is_dense(tensor) for tensor in lists[0]):
            return False
    # A gradient that is the parameter itself, or state that two names share, changes in the middle of a step.
    addresses = [list(map(torch.Tensor.data_ptr, each)) for each in lists]
    return all(len(set(of_one)) == len(of_one) or of_one[0] == 0 for of_one in zip(*addresses, strict=True))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, for the kernels; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _is_dense(tensor: torch.Tensor) -> bool:
    """True if the elements fill a piece of memory without gaps and without being shared, in some order."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()
