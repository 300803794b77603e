"""Tensors that share memory with a model's parameters when it is sharded, such as a state dict from before it.

In plain PyTorch they show what the parameters become. Sharding gives the parameters other memory, so these tensors are
replaced as well, or refused when they are used. NumPy arrays are refused at once, since nobody sees how they are used.
"""

import copy
import gc
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map_only

from moreh.errors import OptionError
from moreh.patches.several_workers.numpy_arrays import known_arrays
from moreh.runtime.batch.model_inputs import ONE_WORKER

# Keys in the `__dict__` of an alias: the tensor that replaces it, and the name of its parameter.
_REPLACEMENT, _NAME = "_moreh_alias_of", "_moreh_alias_name"


@dataclass(frozen=True)
class Alias:
    """A tensor of the script that shares memory with a parameter."""

    tensor: torch.Tensor
    """The tensor."""
    name: str
    """The parameter's name."""
    is_whole: bool
    """True if it has all elements in the parameter's order."""


class _ReplacedAlias(torch.Tensor):
    """An alias of a whole parameter: every torch function that is called with it uses the sharded parameter."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(_ReplacedAlias, _replacement_of, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _replacement_of(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(_replacement_of(self), memo)


class _RefusedAlias(torch.Tensor):
    """A view of parts of a parameter, or of several: no torch function can be called with it."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> NoReturn:
        found: list[str] = []
        tree_map_only(_RefusedAlias, lambda alias: found.append(alias.__dict__[_NAME]), (args, kwargs or {}))
        raise OptionError(
            f"a tensor from before the first training batch shares memory with parts of {found[0]}, which that batch "
            "has sharded over workers: make the view again after that batch, or clone it before"
        )


def check_arrays(parameters: dict[str, nn.Parameter]) -> None:
    """Check that no NumPy array shares memory with parameters that are about to be sharded; collective.

    Raises:
        OptionError: a script has one, on whichever rank.
    """
    plain = ((name, p) for name, p in parameters.items() if type(p) is nn.Parameter and not p.is_meta)
    # Sorted, since a script may have a million arrays of its data.
    extents = sorted((*_extent(parameter), name) for name, parameter in plain)
    starts = [start for start, _, _ in extents]
    # Of the parameters up to each, the one that ends last.
    last = list(accumulate(extents, _that_ends_later))
    found = None
    for first, end in (_extent_of_array(array) for array in known_arrays() if array.size):
        index = bisect_left(starts, end) - 1
        if index >= 0 and last[index][1] > first:
            found = last[index][2]
            break
    if dist.is_initialized():
        of_ranks: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, found)
        found = next((name for name in of_ranks if name is not None), None)
    if found is not None:
        raise OptionError(
            f"a NumPy array shares memory with {found}, which is about to be sharded over workers, and would keep the "
            f"untrained numbers: copy it (.numpy().copy()), delete it before the first training batch, or {ONE_WORKER}"
        )


def aliases_of(parameters: dict[str, nn.Parameter]) -> list[Alias]:
    """The tensors of this process that share memory with parameters, without the parameters themselves."""
    own = {id(parameter) for parameter in parameters.values()}
    by_storage: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in parameters.items():
        if type(parameter) is nn.Parameter and not parameter.is_meta:
            by_storage.setdefault(parameter.untyped_storage().data_ptr(), []).append((name, parameter))
    by_storage.pop(0, None)
    found = []
    for tensor in [each for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter)]:
        if id(tensor) in own or tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
            continue
        sharing = [
            (name, parameter)
            for name, parameter in by_storage.get(tensor.untyped_storage().data_ptr(), ())
            if _overlap(tensor, parameter)
        ]
        if sharing:
            name, parameter = sharing[0]
            found.append(Alias(tensor, name, len(sharing) == 1 and _is_whole(tensor, parameter)))
    return found


def replace_aliases(aliases: list[Alias], parameters: dict[str, nn.Parameter]) -> None:
    """Let aliases of whole parameters follow the sharded ones, and let the others raise an error when they are used.

    They keep their memory, which a NumPy array may have, too.
    """
    for alias in aliases:
        tensor, parameter = alias.tensor, parameters[alias.name]
        tensor.__dict__.update({_REPLACEMENT: parameter, _NAME: alias.name})
        is_replaced = alias.is_whole and not tensor.requires_grad
        tensor.__class__ = _ReplacedAlias if is_replaced else _RefusedAlias


def _replacement_of(alias: torch.Tensor) -> torch.Tensor:
    parameter: torch.Tensor = alias.__dict__[_REPLACEMENT]
    return parameter.detach()


def _is_whole(tensor: torch.Tensor, parameter: torch.Tensor) -> bool:
    return (
        tensor.data_ptr() == parameter.data_ptr()
        and tensor.dtype == parameter.dtype
        and tensor.shape == parameter.shape
        and tensor.stride() == parameter.stride()
    )


def _overlap(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """True if the memory from the first to the last element of two tensors overlaps."""
    (first, end), (other_first, other_end) = _extent(tensor), _extent(other)
    return first < other_end and other_first < end


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    elements = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (elements + 1) * tensor.element_size()


def _that_ends_later(extent: tuple[int, int, str], other: tuple[int, int, str]) -> tuple[int, int, str]:
    return other if other[1] > extent[1] else extent


def _extent_of_array(array: Any) -> tuple[int, int]:
    address: int = array.__array_interface__["data"][0]
    steps = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
    first = address + sum(step for step in steps if step < 0)
    return first, address + sum(step for step in steps if step > 0) + array.itemsize
