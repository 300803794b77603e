"""Models whose weights stay in their files until each rank has read its own shards.

A lazy model is a full model that is waiting for its plan. Its parameters are views of memory-mapped files, in the
dtypes of the files (`lazy_parameters.py`). It ignores moves (`.cuda()`, `.to(device)`) and remembers casts (`.half()`,
`.to(dtype)`), also as a part of another module, until `materialize_local_shards` reads and converts what this rank
holds.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moreh.errors import OptionError
from moreh.models.introspection import is_causal_language_model
from moreh.patches.cuda.device_maps import take_device_map
from moreh.patches.lazy_loading import install_lazy_loading
from moreh.runtime.sharding.lazy_parameters import LazyParameter, as_lazy, convert, file_data, make_ordinary
from moreh.runtime.sharding.mesh import Mesh
from moreh.runtime.sharding.shards import is_owner, local_shape, local_shards
from moreh.runtime.sharding.spec import ParamSpec

# The attribute of a lazy model. While the model is loaded, it has the dtypes that the parameters are to have, by name.
_DTYPES_AFTER_LOADING = "_moreh_dtypes_after_loading"
# Arguments of from_pretrained with which transformers distributes a model itself.
_PLACING_ARGUMENTS = ("tp_plan", "tp_size", "distributed_config", "device_mesh")
# Elements copied at once to a GPU in another dtype, which needs memory for a converted copy.
_COPY_ELEMENTS = 1 << 24


def patch_lazy_loading() -> None:
    """Make `from_pretrained` return lazy models from now on. Call it on each of several workers; again does nothing.

    Models that are not causal language models, which each worker computes whole, are loaded as always. transformers
    renames, ties, merges and initializes weights as always. It loads files that cannot be mapped (.bin,
    gguf, quantized) as always.

    Raises (from `from_pretrained`):
        OptionError: the script gave a `device_map` with several devices, or an argument with which transformers
            distributes a model itself.
    """
    install_lazy_loading(_take_arguments, _begin_loading, _finish_loading)


def _take_arguments(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], torch.device | None]:
    for name in _PLACING_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise OptionError(
                f"from_pretrained was given {name}={kwargs[name]!r}, but with several workers the plan decides where "
                f"the weights go. Leave {name} out."
            )
    return take_device_map(kwargs)


def _begin_loading(model: nn.Module, dtypes: dict[str, torch.dtype]) -> bool:
    if is_lazy_model(model) or not is_causal_language_model(model):
        return False  # the model is loaded already, and now gets an adapter; or each worker will compute all of it
    _set_lazy(model, dtypes)
    return True


def _finish_loading(model: nn.Module, device: torch.device | None) -> None:
    if is_causal_language_model(model):
        dtypes = model.__dict__.get(_DTYPES_AFTER_LOADING, {})
        for name, parameter in model.named_parameters():
            as_lazy(parameter, dtypes.get(name, parameter.dtype))
        _set_lazy(model, {})
    if device is not None and device.type != "cpu":
        model.to("cuda" if device.index is None else device)


def _set_lazy(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    # In `__dict__`, past Module.__setattr__. Unlike a bound method, a partial is copied and pickled with its model.
    model.__dict__[_DTYPES_AFTER_LOADING] = dtypes
    model.__dict__["_apply"] = functools.partial(_remember_dtypes, model)


def _remember_dtypes(
    model: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> nn.Module:
    """Replaces `_apply`, through which torch moves and casts a module: remembers the dtypes that a cast would give.

    Buffers are cast at once: they are in memory.
    """
    for parameter in model.parameters():
        as_lazy(parameter, function(torch.empty(0, dtype=parameter.dtype)).dtype)
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(function(buffer.new_empty(0)).dtype)
    return model


def is_lazy_model(module: nn.Module) -> bool:
    """True if a module is a full model that has not been sharded yet."""
    return _DTYPES_AFTER_LOADING in module.__dict__


def convert_parameters(model: nn.Module) -> list[tuple[LazyParameter, torch.Tensor]]:
    """Convert a lazy model's parameters whole, as a call or a file of the model needs.

    Returns the parameters that were lazy, with their data in the dtypes of the files.
    """
    stored = [(p, file_data(p)) for p in model.parameters() if isinstance(p, LazyParameter)]
    for parameter, _ in stored:
        convert(parameter)
    return stored


@contextmanager
def converted_parameters(model: nn.Module) -> Iterator[None]:
    """A block in which a lazy model's parameters are ordinary ones; converted ones need memory."""
    stored = convert_parameters(model)
    try:
        yield
    finally:
        for parameter, data in stored:
            dtype, parameter.data = parameter.dtype, data
            as_lazy(parameter, dtype)


def has_half_weights(model: nn.Module) -> bool:
    """True if a model's weights are in half precision, as the first one is."""
    return next(model.parameters()).dtype in (torch.bfloat16, torch.float16)


@torch.no_grad()
def materialize_local_shards(
    model: nn.Module, specs: Mapping[str, ParamSpec], mesh: Mesh | None
) -> dict[str, torch.Tensor]:
    """This rank's local tensors of a full model, by name: contiguous, on its device, in the dtypes of the specs.

    Only the rank's shards are read and converted, box by box. The model's own tensors stay as they are; the caller
    replaces them. The model is not lazy afterwards: moves and casts change it again.

    Raises:
        ValueError: a parameter has another shape than its spec says.
    """
    device = torch.device("cpu") if mesh is None else mesh.device
    local_tensors: dict[str, torch.Tensor] = {}
    for name, spec in specs.items():
        if not is_owner(spec, mesh):
            continue
        full = model.get_parameter(name)
        if tuple(full.shape) != spec.shape:
            raise ValueError(f"{name} has the shape {tuple(full.shape)}, but its spec was made for {spec.shape}.")
        local = torch.empty(local_shape(spec, mesh), dtype=spec.dtype, device=device)
        stored = file_data(full)
        for shard in local_shards(spec, mesh):
            _copy(shard.view_of_local(local), shard.view_of_full(stored))
        local_tensors[name] = local
    for parameter in model.parameters():
        make_ordinary(parameter)
    for module in model.modules():
        if is_lazy_model(module):
            del module.__dict__[_DTYPES_AFTER_LOADING], module.__dict__["_apply"]
    return local_tensors


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy into another dtype or onto another device, a few rows at a time, which needs little extra memory."""
    if target.device == source.device or target.dim() == 0:
        target.copy_(source)
        return
    rows = max(1, _COPY_ELEMENTS // max(1, math.prod(source.shape[1:])))
    for first in range(0, source.shape[0], rows):
        target[first : first + rows].copy_(source[first : first + rows])
