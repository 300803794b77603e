"""Makes `from_pretrained` leave the weights in their safetensors files.

transformers maps safetensors files into memory, where pages are read when they are touched, but copies every tensor
that has to change its dtype. With these patches no tensor changes its dtype while it is loaded; the caller learns what
dtype each parameter is to have, and converts what it needs of them.

What was tried instead (transformers 5.23):
- The public `state_dict=` argument with a lazy mapping. `from_pretrained` refuses it together with the name of a
  model. Without the name, finding the files, the configuration, the generation configuration and adapters would be
  ours to repeat.
- The model on the meta device, and slices of the files. Names, ties and merged weights (experts) would be ours to undo.
- `from_pretrained(dtype=...)` with the files' dtype, and a cast afterwards. Buffers would be computed in the files'
  dtype.

Either way `from_pretrained` itself has to be replaced, since it is the script that calls it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from moreh.patches.patch import Patch

FROM_PRETRAINED = Patch(
    target="transformers.modeling_utils.PreTrainedModel.from_pretrained",
    why="On several workers, the plan places the weights and not an argument, and a loaded model stays in its files "
    "until each rank has read its own shards.",
    no_public_way="transformers has no hook that receives a loaded model.",
    tested=("transformers 5.17", "transformers 5.23", "transformers 5.24"),
)
LOAD_PRETRAINED_MODEL = Patch(
    target="transformers.modeling_utils.PreTrainedModel._load_pretrained_model",
    why="Maps tensors of safetensors files into memory as they are stored, instead of copying them in another dtype.",
    no_public_way="`from_pretrained(state_dict=...)` accepts a lazy mapping, but not with the name of a model.",
    tested=("transformers 5.17", "transformers 5.23", "transformers 5.24"),
)

# Given a model on the meta device and the dtypes that its parameters would be loaded in, by name: whether to leave the
# weights in their files.
ShouldStayOnDisk = Callable[[nn.Module, dict[str, torch.dtype]], bool]


class _MappedTensor:
    """Stands in for a tensor of a safetensors file: loads it memory-mapped, without the requested conversion."""

    def __init__(self, tensor_slice: Any) -> None:
        self._slice = tensor_slice

    def __getitem__(self, index: Any) -> "_MappedTensor":
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._slice[...]


def install_lazy_loading(
    take_arguments: Callable[[Mapping[str, Any]], tuple[dict[str, Any], torch.device | None]],
    should_stay_on_disk: ShouldStayOnDisk,
    after_loading: Callable[[nn.Module, torch.device | None], None],
) -> None:
    """Replace `from_pretrained`, once in a process; a second call does nothing.

    Args:
        take_arguments: given the keyword arguments of `from_pretrained`, returns those for transformers and the device
            that the script asked for; raises an error for those to refuse.
        should_stay_on_disk: asked before a model's safetensors files are read. Other files (.bin, gguf, quantized) are
            loaded as always.
        after_loading: called with every model that was loaded, from whatever files, and the device.
    """
    if FROM_PRETRAINED.is_active:
        return
    FROM_PRETRAINED.install(functools.partial(_make_from_pretrained, take_arguments, after_loading))
    LOAD_PRETRAINED_MODEL.install(functools.partial(_make_load, should_stay_on_disk))


def uninstall_lazy_loading() -> None:
    """Put transformers' own functions back."""
    LOAD_PRETRAINED_MODEL.uninstall()
    FROM_PRETRAINED.uninstall()


def _make_from_pretrained(
    take_arguments: Callable[[Mapping[str, Any]], tuple[dict[str, Any], torch.device | None]],
    after_loading: Callable[[nn.Module, torch.device | None], None],
    original: Any,
) -> Any:
    @functools.wraps(original.__func__)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        arguments, device = take_arguments(kwargs)
        result = original.__func__(cls, *args, **arguments)
        after_loading(result[0] if isinstance(result, tuple) else result, device)  # a tuple with output_loading_info
        return result

    return classmethod(from_pretrained)


def _make_load(should_stay_on_disk: ShouldStayOnDisk, original: Any) -> Any:
    @functools.wraps(original.__func__)
    def load(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
        if state_dict is None and _can_be_mapped(checkpoint_files, load_config):
            # The model is on the meta device, its parameters in the dtypes that they would be loaded in.
            dtypes = _dtypes_after_loading(model, load_config.dtype_plan or {})
            if should_stay_on_disk(model, dtypes):
                state_dict = _mapped_tensors(checkpoint_files)
        return original.__func__(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    return staticmethod(load)


def _can_be_mapped(checkpoint_files: Any, load_config: Any) -> bool:
    if load_config.hf_quantizer is not None or load_config.disable_mmap or not checkpoint_files:
        return False
    return all(str(name).endswith(".safetensors") for name in checkpoint_files)


def _mapped_tensors(checkpoint_files: Any) -> dict[str, _MappedTensor]:
    from safetensors import safe_open

    tensors: dict[str, _MappedTensor] = {}
    for name in checkpoint_files:
        file: Any = safe_open(name, framework="pt")
        tensors |= {key: _MappedTensor(file.get_slice(key)) for key in file.keys()}  # noqa: SIM118
    return tensors


def _dtypes_after_loading(model: nn.Module, dtype_plan: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """The dtype in which transformers would load each parameter. `dtype_plan` are the modules kept in float32."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    if dtype_plan:
        from transformers.core_model_loading import build_glob_alternation

        pattern, glob_of_group, _ = build_glob_alternation(list(dtype_plan))
        for name in dtypes:
            match = pattern.search(name)
            if match is not None and match.lastgroup is not None:
                dtypes[name] = dtype_plan[glob_of_group[match.lastgroup]]
    return dtypes
