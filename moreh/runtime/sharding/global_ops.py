"""Operations of a `GlobalTensor` without gathering: elementwise operations, reductions, new tensors."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from moreh.runtime.sharding.global_classes import GlobalTensor, GlobalView, local_part
from moreh.runtime.sharding.global_layout import GlobalLayout
from moreh.runtime.sharding.mesh import Mesh
from moreh.runtime.sharding.shards import global_rank_of
from moreh.trace import span

_aten = torch.ops.aten
# Elementwise, but without torch's tag for it.
_ELEMENTWISE = {
    _aten._to_copy,
    _aten.copy_,
    _aten.empty_like,
    _aten.fill,
    _aten.fill_,
    _aten.full_like,
    _aten.masked_fill_,
    _aten.ones_like,
    _aten.zero_,
    _aten.zeros_like,
}
# It has the tag, and returns one truth value.
_NOT_ELEMENTWISE = {_aten.equal}
_NEW = {_aten.new_empty, _aten.new_empty_strided, _aten.new_zeros, _aten.new_ones, _aten.new_full}


def elementwise(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An elementwise operation on local parts; NotImplemented for others, or if elements are not on the same ranks."""
    if not _is_elementwise(function):
        return NotImplemented
    # None of these operations takes lists, so the arguments need no flattening.
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    layout = next((tensor.global_layout for tensor in tensors if isinstance(tensor, GlobalTensor)), None)
    if layout is None or not all(_meets(tensor, layout) for tensor in tensors):
        return NotImplemented
    changed = written(function, args, kwargs)
    if not all(isinstance(value, GlobalTensor) for value in changed):
        return NotImplemented

    def part(value: Any) -> Any:
        return _part(value, layout) if isinstance(value, torch.Tensor) else value

    result = function(*map(part, args), **{key: part(value) for key, value in kwargs.items()})
    if changed:
        return changed[0] if len(changed) == 1 else tuple(changed)
    if isinstance(result, torch.Tensor):
        return GlobalTensor(result, layout)
    return tuple(GlobalTensor(value, layout) for value in result)


@functools.cache
def _is_elementwise(function: Any) -> bool:
    """True if each element of the result depends on the elements at its place alone."""
    packet = function.overloadpacket
    # Random numbers are drawn for the whole tensor, as on one device.
    if packet in _NOT_ELEMENTWISE or torch.Tag.nondeterministic_seeded in function.tags:
        return False
    return packet in _ELEMENTWISE or torch.Tag.pointwise in function.tags


def elementwise_on_lists(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation of torch._foreach or a fused optimizer, whose lists have one entry for each parameter."""
    name = function.overloadpacket.__name__
    if not name.startswith(("_foreach_", "_fused_")) or name in ("_foreach_max", "_foreach_powsum"):
        return NotImplemented
    if name == "_foreach_norm":
        return _norms(*args, **kwargs)
    lists = [value for value in args if _is_tensor_list(value)]
    layouts = [next((v.global_layout for v in entry if isinstance(v, GlobalTensor)), None) for entry in zip(*lists)]  # noqa: B905
    is_fused = name.startswith("_fused_")
    changed = {id(value) for value in written(function, args, kwargs)}
    for values in lists:
        for value, layout in zip(values, layouts, strict=False):
            if isinstance(value, GlobalView) or (layout is not None and not _meets(value, layout)):
                return NotImplemented
            # Counts of steps are ordinary numbers beside any parameter.
            is_count = value.dim() == 0 and layout is not None and len(layout.shape) > 0
            if layout is not None and id(value) in changed and not isinstance(value, GlobalTensor) and not is_count:
                return NotImplemented
            # The fused kernels of CPUs take memory as it comes.
            if is_fused and id(value) in changed and not local_part(value).is_contiguous():
                return NotImplemented

    def parts(value: Any) -> Any:
        if not _is_tensor_list(value):
            return value
        local = [v if layout is None else _part(v, layout) for v, layout in zip(value, layouts, strict=False)]
        return [v.contiguous() for v in local] if is_fused else local

    result = function(*[parts(value) for value in args], **{key: parts(value) for key, value in kwargs.items()})
    if result is None:
        return None
    if changed:
        return args[0]
    return [v if layout is None else GlobalTensor(v, layout) for v, layout in zip(result, layouts, strict=True)]


def new_tensor(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`tensor.new_zeros(...)` and its like: sharded in the shape of the tensor, else an ordinary tensor."""
    if function.overloadpacket not in _NEW:
        return NotImplemented
    tensor, size, *others = args
    like = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    if not isinstance(tensor, GlobalTensor) or tuple(size) != tuple(tensor.shape):
        return function(like, size, *others, **kwargs)
    if function.overloadpacket is _aten.new_empty_strided:
        return GlobalTensor(_aten.new_empty.default(like, tensor.local.shape, **kwargs), tensor.global_layout)
    return GlobalTensor(function(like, tensor.local.shape, *others, **kwargs), tensor.global_layout)


def reduce_to_number(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A reduction of all elements, over all ranks: an ordinary tensor, the same on each; collective."""
    tensor = args[0] if args else None
    if not isinstance(tensor, GlobalTensor) or tensor.dtype.is_complex:
        return NotImplemented
    if function is _aten.linalg_vector_norm.default:
        return _vector_norm(*args, **kwargs)
    if function is _aten.sum.default:
        return _sum(tensor, **kwargs)
    if function is _aten.mean.default and tensor.is_floating_point():
        dtype = kwargs.get("dtype") or tensor.dtype
        return (_sum(tensor, dtype=torch.promote_types(dtype, torch.float32)) / tensor.numel()).to(dtype)
    if function in (_aten.max.default, _aten.min.default, _aten.any.default, _aten.all.default) and tensor.numel():
        is_max = function in (_aten.max.default, _aten.any.default)
        local = tensor.local if function in (_aten.max.default, _aten.min.default) else tensor.local.bool()
        extreme = _extreme(local, tensor.global_layout, is_max=is_max)
        return extreme.to(local.dtype)
    return NotImplemented


def total_norm(tensors: Sequence[torch.Tensor], norm_type: float, mesh: Mesh) -> torch.Tensor:
    """The norm of all elements of some tensors, each counted once: a scalar, the same bits on every rank; collective.

    Ordinary tensors, which all ranks have, are counted by the first one.
    """
    dtypes = [torch.promote_types(tensor.dtype, torch.float32) for tensor in tensors]
    counted = [local_part(tensor) for tensor in tensors if _is_counted(tensor, mesh)]
    own = _combined(_local_norms(counted, norm_type), norm_type, tensors[0].device)
    with span("all_reduce_grad_norm", own.nbytes):
        of_ranks = _of_all_ranks(own, mesh)
    return _combined(of_ranks, norm_type, own.device).to(max(dtypes, key=lambda dtype: dtype.itemsize))


def _is_counted(tensor: torch.Tensor, mesh: Mesh) -> bool:
    if isinstance(tensor, GlobalTensor):
        return tensor.global_layout.is_counted
    return global_rank_of(mesh) == 0


def _local_norms(tensors: Sequence[torch.Tensor], norm_type: float) -> list[torch.Tensor]:
    return [
        torch.linalg.vector_norm(t.detach(), norm_type, dtype=torch.promote_types(t.dtype, torch.float32)).double()
        for t in tensors
        if t.numel()
    ]


def _combined(norms: Sequence[torch.Tensor], norm_type: float, device: torch.device) -> torch.Tensor:
    """The norm of all elements, from the norms of parts of them."""
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    values = torch.stack([norm.to(device) for norm in norms])
    return torch.linalg.vector_norm(values, norm_type) if norm_type else values.sum()


def _over_ranks(value: torch.Tensor, mesh: Mesh) -> list[torch.Tensor]:
    """The numbers of all ranks, on each of them; collective."""
    with span("all_reduce_number", value.nbytes):
        return _of_all_ranks(value, mesh)


def _of_all_ranks(value: torch.Tensor, mesh: Mesh) -> list[torch.Tensor]:
    """As `_over_ranks`, without a span. A NaN stays NaN."""
    ranks = math.prod(mesh.size(dimension) for dimension in ("pipeline", "data", "tensor"))
    values = torch.zeros(ranks, *value.shape, dtype=value.dtype, device=mesh.device)
    values[global_rank_of(mesh)] = value
    mesh.all_reduce(values)
    return list(values.to(value.device))


def _vector_norm(
    tensor: GlobalTensor, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    if keepdim or (dim is not None and len(dim) not in (0, tensor.dim())) or not ord > 0:
        return NotImplemented
    (norm,) = _norms([tensor], ord, dtype)
    return norm


def _norms(tensors: Sequence[torch.Tensor], ord: float = 2, dtype: torch.dtype | None = None) -> Any:
    """The norm of each tensor, in one message for all."""
    if not ord > 0 or any(isinstance(t, GlobalView) or t.dtype.is_complex for t in tensors):
        return NotImplemented
    sharded = [tensor for tensor in tensors if isinstance(tensor, GlobalTensor)]
    zero = torch.zeros((), dtype=torch.float64, device=sharded[0].device)
    own = torch.stack([next(iter(_local_norms([t.local] * t.global_layout.is_counted, ord)), zero) for t in sharded])
    values = torch.stack(_over_ranks(own, sharded[0].global_layout.mesh))
    norms = iter(torch.linalg.vector_norm(values, ord, dim=0))
    return [
        next(norms).to(dtype or tensor.dtype)
        if isinstance(tensor, GlobalTensor)
        else torch.linalg.vector_norm(tensor, ord, dtype=dtype)
        for tensor in tensors
    ]


def _sum(tensor: GlobalTensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    local = tensor.local if tensor.global_layout.is_counted else tensor.local.new_zeros(0)
    dtype = dtype or (tensor.dtype if tensor.is_floating_point() else torch.int64)
    is_float = dtype.is_floating_point
    own = local.sum(dtype=torch.promote_types(dtype, torch.float32) if is_float else dtype)
    values = torch.stack(_over_ranks(own.to(torch.float64 if is_float else torch.int64), tensor.global_layout.mesh))
    return values.sum().to(dtype)


def _extreme(local: torch.Tensor, layout: GlobalLayout, *, is_max: bool) -> torch.Tensor:
    values: Callable[..., torch.Tensor] = torch.amax if is_max else torch.amin
    ends: tuple[float, float]
    exact, ends = torch.int64, (torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max)
    if local.is_floating_point():
        exact, ends = torch.float64, (-math.inf, math.inf)
    empty = local.new_full((), ends[0] if is_max else ends[1], dtype=exact)
    own = values(local).to(exact) if local.numel() else empty
    return values(torch.stack(_over_ranks(own, layout.mesh)))


def _meets(tensor: torch.Tensor, layout: GlobalLayout) -> bool:
    """True if each of a tensor's elements is where the layout has the element that it meets, or on every rank."""
    if isinstance(tensor, GlobalTensor):
        return tensor.global_layout is layout or tensor.global_layout.matches(layout)
    if isinstance(tensor, GlobalView):
        return False
    shape, whole = tensor.shape, layout.shape
    if len(shape) > len(whole):
        return False
    return all(size in (1, other) for size, other in zip(reversed(shape), reversed(whole), strict=False))


def _part(tensor: torch.Tensor, layout: GlobalLayout) -> torch.Tensor:
    if isinstance(tensor, GlobalTensor):
        return tensor.local
    return tensor if tensor.dim() == 0 else layout.shard(tensor.detach().expand(layout.shape))


def _is_tensor_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(entry, torch.Tensor) for entry in value)


def written(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation changes; lists of tensors flattened."""
    values: list[Any] = []
    for index, name in _written_arguments(function):
        value = args[index] if index < len(args) else kwargs.get(name)
        values += [value] if isinstance(value, torch.Tensor) else tree_leaves(value)
    return values


@functools.cache
def _written_arguments(function: Any) -> list[tuple[int, str]]:
    """Position and name of the arguments that an operation changes."""
    arguments = enumerate(function._schema.arguments)
    return [(index, a.name) for index, a in arguments if a.alias_info is not None and a.alias_info.is_write]
