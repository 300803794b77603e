"""Dispatches torch operations on a `GlobalTensor`: to the shards, to a reduction, or to the gathered tensor."""

import functools
from typing import Any

import torch
from torch.utils._pytree import tree_map

from moreh.runtime.sharding.global_classes import (
    GlobalTensor,
    GlobalView,
    ViewStep,
    WholeTensor,
    dispatch_to,
    local_part,
    own_attributes,
)
from moreh.runtime.sharding.global_ops import elementwise, elementwise_on_lists, new_tensor, reduce_to_number, written

__all__ = ["GlobalTensor", "GlobalView", "WholeTensor", "dispatch", "local_part", "own_attributes"]

_aten = torch.ops.aten
_SAME_MEMORY = (_aten.detach.default, _aten.alias.default)


def dispatch(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation, at least one of whose arguments is a global tensor or a view of one."""
    if function in _SAME_MEMORY:
        return _alias(args[0])
    if _returns_views(function):
        return _views(function, args, kwargs)
    for compute in (elementwise, elementwise_on_lists, reduce_to_number, new_tensor):
        result = compute(function, args, kwargs)
        if result is not NotImplemented:
            return result
    return _on_whole_tensors(function, args, kwargs)


def _alias(tensor: WholeTensor) -> WholeTensor:
    if isinstance(tensor, GlobalTensor):
        return GlobalTensor(tensor.local, tensor.global_layout)
    assert isinstance(tensor, GlobalView)
    return GlobalView(tensor.base, tensor.steps, _meta(tensor))


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without data that has the same geometry."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@functools.cache
def _returns_views(function: Any) -> bool:
    """True if an operation returns views of its first argument and changes nothing."""
    aliases = [result.alias_info for result in function._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _views(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, *others = args
    base, steps = (tensor, ()) if isinstance(tensor, GlobalTensor) else (tensor.base, tensor.steps)
    meta = function(_meta(tensor), *others, **kwargs)
    if isinstance(meta, torch.Tensor):
        return GlobalView(base, (*steps, ViewStep(function, tuple(others), kwargs, None)), meta)
    return [
        GlobalView(base, (*steps, ViewStep(function, tuple(others), kwargs, index)), view)
        for index, view in enumerate(meta)
    ]


def _on_whole_tensors(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Gather the operation's arguments, compute with whole tensors, and write back its changes; collective."""
    gathered: dict[int, torch.Tensor] = {}
    seen: dict[int, torch.Tensor] = {}
    originals: dict[int, WholeTensor] = {}

    def whole(value: Any) -> Any:
        if not isinstance(value, WholeTensor):
            return value
        if id(value) not in seen:
            base = value.base if isinstance(value, GlobalView) else value
            assert isinstance(base, GlobalTensor)
            # Aliases share `local` on every rank: a write to one alias is visible in the other.
            key = id(base.local)
            if key not in gathered:
                gathered[key] = base.full_tensor()
            seen[id(value)] = value.of(gathered[key]) if isinstance(value, GlobalView) else gathered[key]
            originals.setdefault(id(seen[id(value)]), value)
        return seen[id(value)]

    result = function(*tree_map(whole, args), **tree_map(whole, kwargs))
    for value in written(function, args, kwargs):
        if isinstance(value, WholeTensor):
            base = value.base if isinstance(value, GlobalView) else value
            assert isinstance(base, GlobalTensor)
            full = seen[id(value)] if base is value else whole(base)
            base.local.copy_(base.global_layout.shard(full))
    return tree_map(lambda value: originals.get(id(value), value) if isinstance(value, torch.Tensor) else value, result)


dispatch_to(dispatch)
