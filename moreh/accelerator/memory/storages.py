"""The memory behind tensors: what two tensors share, and what counts once."""

from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy


def storage_of(tensor: torch.Tensor) -> Any:
    """The untyped storage of a tensor; None for one that has no memory of its own to count.

    Those are sparse tensors, tensors of which only the shape is known (meta, fake, not yet initialized), and the
    stand-ins with which torch.func computes.
    """
    if (
        tensor.layout != torch.strided
        or tensor.is_meta
        or is_lazy(tensor)
        or isinstance(tensor, FakeTensor)
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    ):
        return None
    return tensor.untyped_storage()


def shares_storage(tensor: torch.Tensor, other: Any) -> bool:
    """Whether a change of one tensor in place would be seen in the other."""
    if tensor is other:
        return True
    if not isinstance(other, torch.Tensor):
        return False
    storage, of_other = storage_of(tensor), storage_of(other)
    return storage is not None and of_other is not None and storage._cdata == of_other._cdata


def storage_bytes(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Address -> bytes of the storages of tensors."""
    found = {}
    for tensor in tensors:
        storage = storage_of(tensor)
        if storage is not None:
            found[storage._cdata] = storage.nbytes()
    return found
