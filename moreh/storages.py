"""Storages of tensors: shared memory, and its size.

Used by the CUDA face (`moreh.patches.cuda`), which must know aliases from copies, and by the memory ledger
(`moreh.accelerator.memory`), which counts each storage once.
"""

from collections.abc import Iterable

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The untyped storage of a tensor; None for a tensor that has no memory of its own to count.

    Of a tensor that is sharded over ranks, it is the storage of this rank's part. None have:
    - sparse tensors,
    - tensors without data: on the meta device, fake, or an uninitialized parameter of a lazy module,
    - the wrapper tensors of torch.func, and those of a class that refuses to give its storage.
    """
    if type(tensor) not in _PLAIN_TENSORS and hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    if (
        tensor.layout != torch.strided
        or tensor.is_meta
        or is_lazy(tensor)
        or isinstance(tensor, FakeTensor)
        or type(tensor).untyped_storage is not torch.Tensor.untyped_storage
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    ):
        return None
    with torch._C.DisableTorchFunctionSubclass():  # a class may answer with the storage of a converted copy
        return tensor.untyped_storage()


def storage_address(storage: torch.UntypedStorage) -> int:
    """The address of a storage's C++ object: equal for all Python objects of the same storage."""
    address: int = storage._cdata
    return address


def shares_storage(tensor: torch.Tensor, other: object) -> bool:
    """True if an in-place change of one tensor would be visible in the other."""
    if tensor is other:
        return True
    if not isinstance(other, torch.Tensor):
        return False
    storage, other_storage = storage_of(tensor), storage_of(other)
    if storage is None or other_storage is None:
        return False
    return storage_address(storage) == storage_address(other_storage)


def storage_bytes(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """The sizes of the storages of some tensors in bytes, by `storage_address`."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        storage = storage_of(tensor)
        if storage is not None:
            sizes[storage_address(storage)] = storage.nbytes()
    return sizes
