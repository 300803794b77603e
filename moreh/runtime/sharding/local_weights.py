"""Models whose weights stay in their files until each rank has read its own shards.

A lazy model is a full model that is waiting for its plan. Its parameters are views of memory-mapped files, in the
dtypes of the files. It ignores moves (`.cuda()`, `.to(device)`) and remembers casts (`.half()`, `.to(dtype)`), also as
a part of another module, until `materialize_local_shards` reads and converts what this rank holds.
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
from moreh.runtime.sharding.mesh import Mesh
from moreh.runtime.sharding.shards import is_owner, local_shape, local_shards
from moreh.runtime.sharding.spec import ParamSpec

# The attribute of a lazy model with the dtypes that its parameters are to have, by name. Each parameter has its own
# dtype in the same attribute. Both are needed: wrapping a module (adapters) changes names, and replacing a parameter
# (resized embeddings) loses the attribute.
_TARGET_DTYPES = "_moreh_target_dtypes"
# Arguments of from_pretrained with which transformers distributes a model itself.
_PLACING_ARGUMENTS = ("tp_plan", "tp_size", "distributed_config", "device_mesh")
# Elements copied at once to a GPU in another dtype, which needs memory for a converted copy.
_COPY_ELEMENTS = 1 << 24


def patch_lazy_loading() -> None:
    """Make `from_pretrained` return lazy models from now on. Call it on each of several workers; again does nothing.

    Models that are not causal language models, which each worker computes whole, are loaded as always. transformers
    renames, ties, merges and initializes weights as always. It loads files that cannot be mapped (.bin,
    gguf, quantized) as always. The model's `config.dtype` is what the script asked for; its tensors have the dtypes of
    the files.

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
        _mark_lazy(model, model.__dict__.get(_TARGET_DTYPES, {}))
    if device is not None and device.type != "cpu":
        model.to("cuda" if device.index is None else device)


def _mark_lazy(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Make a full model lazy. `dtypes` has the dtype that a parameter is to have, where it is not the present one."""
    _set_lazy(model, dtypes)
    for name, parameter in model.named_parameters():
        setattr(parameter, _TARGET_DTYPES, dtypes.get(name, parameter.dtype))


def _set_lazy(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    # In `__dict__`, past Module.__setattr__. Unlike a bound method, a partial is copied and pickled with its model.
    model.__dict__[_TARGET_DTYPES] = dtypes
    model.__dict__["_apply"] = functools.partial(_remember_dtypes, model)


def _remember_dtypes(
    model: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> nn.Module:
    """Replaces `_apply`, through which torch moves and casts a module: remembers the dtypes that a cast would give.

    Buffers are cast at once: they are in memory.
    """
    dtypes = target_dtypes(model)
    empty = {dtype: torch.empty(0, dtype=dtype) for dtype in dtypes.values()}
    _mark_lazy(model, {name: function(empty[dtype]).dtype for name, dtype in dtypes.items()})
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(function(buffer.new_empty(0)).dtype)
    return model


def is_lazy_model(module: nn.Module) -> bool:
    """True if a module is a full model that has not been sharded yet."""
    return _TARGET_DTYPES in module.__dict__


def target_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """The dtype that each parameter is to have once the model is sharded, by name."""
    remembered: dict[str, torch.dtype] = {}
    for prefix, module in model.named_modules():
        for name, dtype in module.__dict__.get(_TARGET_DTYPES, {}).items():
            remembered.setdefault(f"{prefix}.{name}" if prefix else name, dtype)
    return {
        name: getattr(parameter, _TARGET_DTYPES, remembered.get(name, parameter.dtype))
        for name, parameter in model.named_parameters()
    }


def convert_to_target_dtypes(model: nn.Module) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Give a lazy model's parameters the dtypes that they are to have, whole, as a call or a file of the model needs.

    Returns the parameters that had another one, with their data.
    """
    if not any(is_lazy_model(module) for module in model.modules()):
        return []
    dtypes = target_dtypes(model)
    others = [(p, p.data, dtypes[name]) for name, p in model.named_parameters() if p.dtype != dtypes[name]]
    for parameter, data, dtype in others:
        parameter.data = data.to(dtype)
    return [(parameter, data) for parameter, data, _ in others]


@contextmanager
def with_target_dtypes(model: nn.Module) -> Iterator[None]:
    """A block in which a lazy model's parameters have the dtypes that they are to have; converted ones need memory."""
    converted = convert_to_target_dtypes(model)
    try:
        yield
    finally:
        for parameter, data in converted:
            parameter.data = data


def has_half_weights(model: nn.Module) -> bool:
    """True if a model's weights are in half precision, as the first one is or will be once the model is sharded."""
    return next(iter(target_dtypes(model).values())) in (torch.bfloat16, torch.float16)


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
        for shard in local_shards(spec, mesh):
            _copy(shard.view_of_local(local), shard.view_of_full(full))
        local_tensors[name] = local
    for module in model.modules():
        if is_lazy_model(module):
            del module.__dict__[_TARGET_DTYPES], module.__dict__["_apply"]
    return local_tensors


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy into another dtype or onto another device, a few rows at a time, which needs little extra memory."""
    if target.device == source.device or target.dim() == 0:
        target.copy_(source)
        return
    rows = max(1, _COPY_ELEMENTS // max(1, math.prod(source.shape[1:])))
    for first in range(0, source.shape[0], rows):
        target[first : first + rows].copy_(source[first : first + rows])
