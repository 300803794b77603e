"""Plans the files of `save_pretrained` for a sharded model, without its weights.

transformers' own `save_pretrained` runs on traced tensors without data. So the names, the ties, the conversion of
weights back to the checkpoint's layout, and the split into files are those of transformers.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from moreh.patches.save_pretrained import recording_weight_files
from moreh.runtime.checkpoint.safetensors_writer import TensorKind
from moreh.runtime.sharding.spec import ParamSpec


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file to write."""

    name: str
    """The file's name in the directory."""
    tensors: Mapping[str, TensorKind]
    """The file's tensors, by their names in the file."""
    metadata: Mapping[str, str]
    """The metadata of its header."""


@dataclass(frozen=True)
class Conversion:
    """Tensors of the model, and the tensors of the files that are made from them together."""

    sources: tuple[str, ...]
    """Names in the model's state dict. All are needed at the same time."""
    targets: tuple[str, ...]
    """Names in the files."""
    is_identity: bool
    """True if the one source is saved unchanged under the one target's name. Else transformers converts the sources."""


@dataclass(frozen=True)
class SavePlan:
    """The plan for writing a model's weights."""

    files: tuple[WeightFile, ...]
    """The files in transformers' order."""
    conversions: tuple[Conversion, ...]
    """The conversions that make the files' tensors, in the order of the files."""


class _TracedTensor(torch.Tensor):
    """A tensor without data that records the names of the model's tensors from which it was made."""

    sources: frozenset[str]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _TracedTensor)]
        for output in tree_leaves(result):
            if isinstance(output, _TracedTensor) and "sources" not in output.__dict__:
                output.sources = frozenset().union(*(tensor.sources for tensor in inputs))
        return result


@dataclass(frozen=True)
class StateDictEntry:
    """An entry of a model's state dict."""

    source: str
    """The first name of its tensor: the entry's own name, or another entry's if the two are tied."""
    module: nn.Module
    """The module that has the tensor."""
    key: str
    """The tensor's name in the module."""


def state_dict_entries(model: nn.Module) -> dict[str, StateDictEntry]:
    """The entries of the full model's state dict in order: parameters and persistent buffers, tied ones each time."""
    entries: dict[str, StateDictEntry] = {}
    first_names: dict[int, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        buffers = {
            key: buffer for key, buffer in module._buffers.items() if key not in module._non_persistent_buffers_set
        }
        for key, tensor in (module._parameters | buffers).items():
            if tensor is not None:
                name = f"{prefix}.{key}" if prefix else key
                entries[name] = StateDictEntry(first_names.setdefault(id(tensor), name), module, key)
    return entries


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The persistent buffers, by their names in the state dict."""
    buffers = ((name, entry.module._buffers.get(entry.key)) for name, entry in state_dict_entries(model).items())
    return {name: buffer for name, buffer in buffers if buffer is not None}


@contextlib.contextmanager
def with_full_shapes(model: nn.Module, specs: Mapping[str, ParamSpec]) -> Iterator[None]:
    """A block in which the model has its full parameters, on the meta device. Tied parameters are one object.

    Raises:
        ValueError: the model has a parameter without a spec.
    """
    entries = state_dict_entries(model)
    replaced = {name: entry for name, entry in entries.items() if entry.key in entry.module._parameters}
    missing = {entry.source for entry in replaced.values()} - specs.keys()
    if missing:
        raise ValueError(
            f"The model has parameters that are not among those that were sharded: {', '.join(sorted(missing)[:5])}. "
            "Add parameters before the first call of the model, when it is sharded."
        )
    originals = {name: entry.module._parameters[entry.key] for name, entry in replaced.items()}
    full = {entry.source: _meta_parameter(specs[entry.source]) for entry in replaced.values()}
    try:
        for entry in replaced.values():
            entry.module._parameters[entry.key] = full[entry.source]
        yield
    finally:
        for name, entry in replaced.items():
            entry.module._parameters[entry.key] = originals[name]


def _meta_parameter(spec: ParamSpec) -> nn.Parameter:
    tensor = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
    return nn.Parameter(tensor, requires_grad=spec.dtype.is_floating_point)


def plan_save(model: Any, directory: Path, save_kwargs: Mapping[str, Any]) -> SavePlan:
    """Run transformers' `save_pretrained` on a model with full shapes: it writes everything but the weights.

    Args:
        model: in a block of `with_full_shapes`.
        directory: where the configuration and the index are written.
        save_kwargs: keyword arguments of `save_pretrained`.
    """
    state_dict: dict[str, torch.Tensor] = {}
    source_of: dict[int, str] = {}
    for name, entry in state_dict_entries(model).items():
        tensor = getattr(entry.module, entry.key)
        traced = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").as_subclass(_TracedTensor)
        traced.sources = frozenset([entry.source])
        state_dict[name], source_of[id(traced)] = traced, entry.source
    alive = list(state_dict.values())  # transformers drops entries, and an id must not be given twice
    files: list[WeightFile] = []
    saved: list[tuple[str, torch.Tensor]] = []

    def record(tensors: dict[str, torch.Tensor], filename: str, metadata: dict[str, str]) -> None:
        kinds = {name: TensorKind(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        files.append(WeightFile(Path(filename).name, kinds, metadata))
        saved.extend(tensors.items())

    # transformers' own method, even if the sharded model has another.
    save_pretrained = inspect.unwrap(type(model).save_pretrained)
    with recording_weight_files(record):
        save_pretrained(model, directory, state_dict=state_dict, **save_kwargs)
    conversions = _conversions(saved, {id(tensor): source_of[id(tensor)] for tensor in alive})
    return SavePlan(tuple(files), conversions)


def _conversions(saved: list[tuple[str, torch.Tensor]], source_of: Mapping[int, str]) -> tuple[Conversion, ...]:
    """The conversions that make the saved tensors. Tensors that share a source are made together.

    `source_of` has the source of each tensor that `save_pretrained` was given, by the tensor's id.
    """
    conversions: list[Conversion] = []
    groups: list[tuple[set[str], list[str]]] = []
    for name, tensor in saved:
        if id(tensor) in source_of:
            conversions.append(Conversion((source_of[id(tensor)],), (name,), is_identity=True))
            continue
        assert isinstance(tensor, _TracedTensor)
        sources, targets = set(tensor.sources), [name]
        for group in [group for group in groups if group[0] & sources]:
            sources |= group[0]
            targets = group[1] + targets
            groups.remove(group)
        groups.append((sources, targets))
    conversions += [Conversion(tuple(sorted(sources)), tuple(targets), False) for sources, targets in groups]
    position = {name: index for index, (name, _) in enumerate(saved)}
    return tuple(sorted(conversions, key=lambda conversion: position[conversion.targets[0]]))
