"""The classes of sharded parameters, gradients and optimizer state as the script sees them: whole tensors.

Import them from `global_tensor.py`, which dispatches the operations on them.

A `GlobalTensor` has the shape of the whole tensor and holds this rank's part of it. Operations on it give the results
that they give on the whole tensor on one device:

- elementwise operations, with each other and with ordinary tensors of the whole shape, compute on the local parts;
- reductions to a number are summed over the ranks (`global_ops.py`);
- everything else gathers the whole tensor, computes on it, and writes back its changes.

DTensor does not serve: `.item()` of a DTensor that is not yet reduced gives this rank's part, a DTensor does not mix
with ordinary tensors, has no pipeline dimension, and regroups the columns of a matrix that is split in several chunks.

Operations that need other ranks are collective. Every worker runs the whole script, so every worker reaches them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from moreh.errors import OptionError
from moreh.runtime.sharding.global_layout import GlobalLayout

# Computes operations on the classes. `global_tensor.py`, which imports this file, sets it.
_dispatch: list[Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = []


def dispatch_to(function: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
    """Let a function compute all operations of torch on these classes, given the operation and its arguments."""
    _dispatch[:] = [function]


class WholeTensor(torch.Tensor):
    """The base of sharded tensors and their views: the methods of torch that are not dispatched."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def full_tensor(self) -> torch.Tensor:
        """The whole tensor, on every rank; collective. Changes of it do not reach the sharded one."""
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _dispatch[0](function, args, kwargs or {})

    def numpy(self, *, force: bool = False) -> Any:
        """The whole tensor as a read-only array; collective."""
        if self.requires_grad and not force:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        array = self.full_tensor().numpy(force=force)
        array.flags.writeable = False
        return array

    def __array__(self, dtype: Any = None) -> Any:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def tolist(self) -> Any:
        """The whole tensor as nested lists; collective."""
        return self.full_tensor().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        text = repr(self.full_tensor().requires_grad_(self.requires_grad and self.is_leaf))
        return f"Parameter containing:\n{text}" if isinstance(self, nn.Parameter) else text

    def __format__(self, format_spec: str) -> str:
        whole = self.full_tensor()
        return format(whole.item(), format_spec) if whole.dim() == 0 else format(whole, format_spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled whole, as an ordinary tensor; collective."""
        whole = self.full_tensor().requires_grad_(self.requires_grad)
        if isinstance(self, nn.Parameter):
            whole = nn.Parameter(whole, self.requires_grad)
        whole.__dict__.update(own_attributes(self))
        return whole.__reduce_ex__(protocol)

    def untyped_storage(self) -> NoReturn:
        """Refused: there is no memory that has all elements."""
        raise OptionError(
            "the memory of a parameter that is sharded over workers was asked for, as safetensors does: no worker has "
            "all of it; save the model with model.save_pretrained(directory), or ask p.detach().full_tensor(), which "
            "is a whole copy"
        )

    storage = share_memory_ = untyped_storage

    def __eq__(self, other: object) -> Any:
        """Elementwise; true for the parameter which this one has replaced, as a dictionary compares its keys."""
        original = self.__dict__.get("_moreh_original")
        return True if original is not None and other is original else super().__eq__(other)

    def __hash__(self) -> int:
        """The hash of the parameter which this one has replaced, if any: either finds the key of a dictionary."""
        # The original, which has no data any more, is kept: no other tensor gets its address, and so its hash.
        original = self.__dict__.get("_moreh_original")
        return id(self) if original is None else id(original)


class GlobalTensor(WholeTensor):
    """A whole tensor of which this rank holds a part."""

    local: torch.Tensor
    """This rank's part, an ordinary tensor; without elements where the rank holds nothing. Aliases share the object."""
    global_layout: GlobalLayout
    """The layout of the whole tensor over the ranks."""

    @staticmethod
    def __new__(cls: Any, local: torch.Tensor, layout: GlobalLayout) -> "GlobalTensor":
        """Make a tensor of its fields; it shares the memory of `local`."""
        if tuple(local.shape) != layout.local_shape:
            raise ValueError(
                f"{layout.spec.name}: the local tensor is {list(local.shape)}, the layout says "
                f"{list(layout.local_shape)}"
            )
        tensor: GlobalTensor = torch.Tensor._make_wrapper_subclass(
            cls, layout.shape, dtype=local.dtype, device=local.device
        )
        tensor.local, tensor.global_layout = local, layout
        return tensor

    def __init__(self, local: torch.Tensor, layout: GlobalLayout) -> None:
        super().__init__()

    def full_tensor(self) -> torch.Tensor:
        """The whole tensor, on every rank; collective. Changes of it do not reach the sharded one."""
        return self.global_layout.gather(self.local)

    def to_local(self) -> torch.Tensor:
        """This rank's part, as of a DTensor; memory is shared."""
        return self.local

    @property
    def data(self) -> torch.Tensor:
        """The same elements without their history, as in torch."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        """Give the tensor the memory of `value`, as in torch; of an ordinary tensor, copy this rank's part.

        Raises:
            OptionError: `value` has another shape or dtype.
        """
        if value.shape != self.shape or value.dtype != self.dtype:
            raise OptionError(
                f"p.data = a tensor {list(value.shape)} of {value.dtype}: parameters that are sharded over workers "
                f"keep their shape {list(self.shape)} and {self.dtype}; resize and cast a model before its first "
                "training step"
            )
        if isinstance(value, GlobalTensor) and value.global_layout.matches(self.global_layout):
            self.local = value.local
        else:
            full = value.full_tensor() if isinstance(value, WholeTensor) else value.detach()
            self.local = self.global_layout.shard(full.to(self.device))

    def __deepcopy__(self, memo: dict[int, Any]) -> "GlobalTensor":
        # Aliases stay aliases: entries of tied parameters in a state dict.
        local = memo.setdefault(id(self.local), self.local.clone())
        copied: Any = GlobalTensor(local, self.global_layout)
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        elif self.requires_grad:
            copied.requires_grad_()
        if self.grad is not None:
            copied.grad = self.grad.__deepcopy__(memo) if isinstance(self.grad, GlobalTensor) else self.grad.clone()
        memo[id(self)] = copied
        return copied


@dataclass(frozen=True)
class ViewStep:
    """One view of a tensor, to be taken again of another one."""

    function: Callable[..., Any]
    """An operation of torch that returns views of its first argument."""
    args: tuple[Any, ...]
    """The arguments after the first one."""
    kwargs: dict[str, Any]
    """The keyword arguments."""
    index: int | None
    """The index of the view, if the operation returns several."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of a tensor."""
        views = self.function(tensor, *self.args, **self.kwargs)
        return views if self.index is None else views[self.index]


class GlobalView(WholeTensor):
    """A view of a whole tensor, such as rows or a transposition. It has no memory; writes to it reach the tensor."""

    base: GlobalTensor
    """The tensor of which it is a view."""
    steps: tuple[ViewStep, ...]
    """The views that lead to it, each one of the result of the one before."""

    @staticmethod
    def __new__(cls: Any, base: GlobalTensor, steps: tuple[ViewStep, ...], meta: torch.Tensor) -> "GlobalView":
        """See the fields. `meta` has the view's shape and strides."""
        view: GlobalView = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=base.device,
        )
        view.base, view.steps = base, steps
        return view

    def __init__(self, base: GlobalTensor, steps: tuple[ViewStep, ...], meta: torch.Tensor) -> None:
        super().__init__()

    def of(self, full: torch.Tensor) -> torch.Tensor:
        """The same view of the gathered base."""
        for step in self.steps:
            full = step.of(full)
        return full

    def full_tensor(self) -> torch.Tensor:
        """The viewed values, on every rank; collective. Changes of the result do not reach the sharded tensor."""
        return self.of(self.base.full_tensor())

    @property
    def data(self) -> torch.Tensor:
        """The same view without its history, as in torch."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> NoReturn:
        raise OptionError(
            "the data of a view of a parameter that is sharded over workers was assigned: write p[...] = value"
        )


def own_attributes(tensor: torch.Tensor) -> dict[str, Any]:
    """The attributes that a script, or a library, has given to a tensor."""
    of_this_package = (*GlobalTensor.__annotations__, *GlobalView.__annotations__)
    return {
        name: value
        for name, value in vars(tensor).items()
        if name not in of_this_package and not name.startswith("_moreh_")
    }


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a global tensor; any other tensor as it is."""
    return tensor.local if isinstance(tensor, GlobalTensor) else tensor
