"""Weights of a model that several workers divide: left in the checkpoint's files until each takes its own part.

`PreTrainedModel.from_pretrained` maps safetensors files into memory, where pages are read when they are touched, but copies
whatever has to change its dtype. Here the change of dtype is put off until the parts are taken, and so is every move.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from moreh.errors import OptionError
from moreh.runtime.sharding.mesh import Mesh
from moreh.runtime.sharding.shards import is_owner, local_shape, local_shards
from moreh.runtime.sharding.spec import ParamSpec

# The attribute of a model that is still whole: the dtypes that its parameters are to have, by name. A parameter has the same
# attribute, since names change when modules are wrapped (adapters) and parameters when they are replaced (resized embeddings).
_TARGET_DTYPES = "_moreh_wanted"
# Elements converted at once on the way to a GPU, where a copy with another dtype needs memory of its own.
_ELEMENTS_AT_ONCE = 1 << 24


class _OnDisk:
    """Stands in for a tensor of a safetensors file: loads it mapped, whatever dtype it is asked for."""

    def __init__(self, tensor_slice: Any) -> None:
        self._slice = tensor_slice

    def __getitem__(self, index: Any) -> "_OnDisk":
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._slice[...]


def patch_lazy_loading() -> None:
    """From now on `from_pretrained` leaves weights in their files, as described above; once in each of several workers.

    Renamed, tied, missing and merged weights are transformers' own matter as always. Files that cannot be mapped (.bin, gguf,
    quantised) are loaded as always too. A model so loaded ignores moves (`.cuda()`, `.to(device)`) and remembers casts
    (`.half()`, `.to(dtype)`) until `materialize_local_shards`, also as a part of another module; its `config.dtype` is what was asked
    for, its tensors what is stored.

    Raises (from `from_pretrained`):
        OptionError: `device_map`, or an argument with which transformers distributes a model itself, was given.
    """
    from transformers import PreTrainedModel

    if getattr(PreTrainedModel.from_pretrained, "keeps_on_disk", False):
        return
    _replace_loading(PreTrainedModel)
    module_class: Any = nn.Module
    module_class._apply = _recording_apply(module_class._apply)


def _replace_loading(model_class: Any) -> None:
    original_from_pretrained = model_class.from_pretrained.__func__
    original_load = model_class._load_pretrained_model

    @functools.wraps(original_from_pretrained)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        for name in ("device_map", "tp_plan", "tp_size", "distributed_config", "device_mesh"):
            if kwargs.get(name) is not None:
                raise OptionError(
                    f"from_pretrained was given {name}={kwargs[name]!r}, but where the weights go is decided by the plan of "
                    f"the parallelization that this script enables. Leave {name} out."
                )
        loaded = original_from_pretrained(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        mark_lazy(model, model.__dict__.get(_TARGET_DTYPES, {}))
        return loaded

    from_pretrained.keeps_on_disk = True  # type: ignore[attr-defined]

    @functools.wraps(original_load)
    def load(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
        mapped = state_dict is None and load_config.hf_quantizer is None and not load_config.disable_mmap
        # A model that is loaded already gets an adapter.
        mapped = mapped and not is_lazy_model(model)
        if (
            not mapped
            or not checkpoint_files
            or not all(str(name).endswith(".safetensors") for name in checkpoint_files)
        ):
            return original_load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        from safetensors import safe_open

        # The model is still on the meta device here, its parameters in the dtypes that they are to get.
        model.__dict__[_TARGET_DTYPES] = _dtypes_after_loading(model, load_config.dtype_plan or {})
        on_disk: dict[str, _OnDisk] = {}
        for name in checkpoint_files:
            file: Any = safe_open(name, framework="pt")
            on_disk |= {key: _OnDisk(file.get_slice(key)) for key in file.keys()}  # noqa: SIM118
        return original_load(model, on_disk, checkpoint_files, load_config, *args, **kwargs)

    model_class.from_pretrained = classmethod(from_pretrained)
    model_class._load_pretrained_model = staticmethod(load)


def _dtypes_after_loading(model: nn.Module, dtype_plan: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """The dtype of each parameter as transformers would load it. `dtype_plan` are the modules that it keeps in float32."""
    wanted = {name: parameter.dtype for name, parameter in model.named_parameters()}
    if dtype_plan:
        from transformers.core_model_loading import build_glob_alternation

        pattern, key_of_group, _ = build_glob_alternation(list(dtype_plan))
        for name in wanted:
            match = pattern.search(name)
            if match is not None and match.lastgroup is not None:
                wanted[name] = dtype_plan[key_of_group[match.lastgroup]]
    return wanted


def _recording_apply(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Module._apply`, through which modules are moved and cast: a whole model only remembers the dtypes."""

    @functools.wraps(original)
    def apply(self: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        if not is_lazy_model(self):
            return original(self, function, recurse)
        empty = {dtype: torch.empty(0, dtype=dtype) for dtype in target_dtypes(self).values()}
        mark_lazy(self, {name: function(empty[dtype]).dtype for name, dtype in target_dtypes(self).items()})
        return self

    return apply


def mark_lazy(model: nn.Module, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
    """Let a whole model stay where it is until its parts are taken; `dtypes` are those that its parameters are to have."""
    # Past Module.__setattr__ and out of the state dict.
    model.__dict__[_TARGET_DTYPES] = dict(dtypes or {})
    for name, parameter in model.named_parameters():
        setattr(parameter, _TARGET_DTYPES, model.__dict__[_TARGET_DTYPES].get(name, parameter.dtype))


def is_lazy_model(module: nn.Module) -> bool:
    """Whether a module is a whole model that has not been divided yet, so that moves and casts must leave it alone."""
    return _TARGET_DTYPES in module.__dict__


def target_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """The dtype that each parameter has once the model is divided, as the script asked for it; by the parameters' names."""
    remembered: dict[str, torch.dtype] = {}
    for prefix, module in model.named_modules():
        for name, dtype in module.__dict__.get(_TARGET_DTYPES, {}).items():
            remembered.setdefault(f"{prefix}.{name}" if prefix else name, dtype)
    parameters = model.named_parameters()
    return {name: getattr(one, _TARGET_DTYPES, remembered.get(name, one.dtype)) for name, one in parameters}


@torch.no_grad()
def materialize_local_shards(
    model: nn.Module,
    layouts: Mapping[str, ParamSpec],
    mesh: Mesh | None,
    keep: Callable[[str], bool] = lambda name: True,
) -> dict[str, torch.Tensor]:
    """This rank's parts of a whole model: new contiguous tensors on its device, in the dtypes of the layouts.

    Only what the rank holds is read and converted, piece by piece. `keep` can leave out names that the layouts give it. The
    model's own tensors stay as they are, for the caller to drop; from now on moves and casts change the model again.

    Raises:
        ValueError: a parameter has another shape than its layout says.
    """
    device = torch.device("cpu") if mesh is None else mesh.device
    parts: dict[str, torch.Tensor] = {}
    for name, layout in layouts.items():
        if not is_owner(layout, mesh) or not keep(name):
            continue
        whole = model.get_parameter(name)
        if tuple(whole.shape) != layout.shape:
            raise ValueError(f"{name} has the shape {tuple(whole.shape)}, but its layout was made for {layout.shape}.")
        part = torch.empty(local_shape(layout, mesh), dtype=layout.dtype, device=device)
        for piece in local_shards(layout, mesh):
            _copy(piece.of_local(part), piece.of_whole(whole))
        parts[name] = part
    for module in model.modules():
        module.__dict__.pop(_TARGET_DTYPES, None)
    return parts


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy into another dtype or onto another device, with little memory besides."""
    if target.device == source.device or target.dim() == 0:
        target.copy_(source)
        return
    rows = max(1, _ELEMENTS_AT_ONCE // max(1, math.prod(source.shape[1:])))
    for first in range(0, source.shape[0], rows):
        target[first : first + rows].copy_(source[first : first + rows])
