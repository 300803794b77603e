"""What transformers saves of a whole model, found out without the weights: its own code is run on tensors without data.

So keys, ties, weights that are converted back to the layout of the checkpoint, and the division into files are its own.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from moreh.runtime.checkpoint.safetensors_writer import TensorKind
from moreh.runtime.sharding.spec import ParamSpec


@dataclass(frozen=True)
class SavedFile:
    """A safetensors file that is to be written."""

    name: str
    tensors: Mapping[str, TensorKind]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Conversion:
    """Tensors of the model that are needed at the same time to make some tensors of the files.

    Where `as_it_is`, the one is the other under its `saved` name; else transformers' conversion makes them.
    """

    sources: tuple[str, ...]
    saved: tuple[str, ...]
    as_it_is: bool


@dataclass(frozen=True)
class SavePlan:
    """The files and what makes their tensors, in the order of the files."""

    files: tuple[SavedFile, ...]
    conversions: tuple[Conversion, ...]


class _Traced(torch.Tensor):
    """A tensor without data that knows which tensors of the model it was made from."""

    sources: frozenset[str]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        known = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _Traced)]
        for leaf in tree_leaves(result):
            if isinstance(leaf, _Traced) and "sources" not in leaf.__dict__:
                leaf.sources = frozenset().union(*(one.sources for one in known))
        return result


@dataclass(frozen=True)
class Entry:
    """An entry of a model's state dict: the name under which its tensor is known, another one's where they are tied."""

    source: str
    module: nn.Module
    key: str


def state_entries(model: nn.Module) -> dict[str, Entry]:
    """The entries of the whole model's state dict in its order: parameters and persistent buffers, tied ones each time."""
    entries: dict[str, Entry] = {}
    first: dict[int, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        buffers = {
            key: value for key, value in module._buffers.items() if key not in module._non_persistent_buffers_set
        }
        for key, tensor in (module._parameters | buffers).items():
            if tensor is not None:
                name = f"{prefix}.{key}" if prefix else key
                entries[name] = Entry(first.setdefault(id(tensor), name), module, key)
    return entries


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The persistent buffers, by their names in the state dict."""
    found = ((name, entry.module._buffers.get(entry.key)) for name, entry in state_entries(model).items())
    return {name: buffer for name, buffer in found if buffer is not None}


@contextlib.contextmanager
def with_full_shapes(model: nn.Module, layouts: Mapping[str, ParamSpec]) -> Iterator[None]:
    """Within it the model's parameters are those of the whole model, without data; tied ones are the same object.

    Raises:
        ValueError: the model has a parameter without a layout.
    """
    entries = state_entries(model)
    replaced = {name: entry for name, entry in entries.items() if entry.key in entry.module._parameters}
    missing = {entry.source for entry in replaced.values()} - layouts.keys()
    if missing:
        raise ValueError(
            f"The model has parameters that are not among those that were divided: {', '.join(sorted(missing)[:5])}. "
            "Add parameters before the first call of the model, when it is divided."
        )
    originals = {name: entry.module._parameters[entry.key] for name, entry in replaced.items()}
    whole = {entry.source: _without_data(layouts[entry.source]) for entry in replaced.values()}
    try:
        for entry in replaced.values():
            entry.module._parameters[entry.key] = whole[entry.source]
        yield
    finally:
        for name, entry in replaced.items():
            entry.module._parameters[entry.key] = originals[name]


def _without_data(layout: ParamSpec) -> nn.Parameter:
    tensor = torch.empty(layout.shape, dtype=layout.dtype, device="meta")
    return nn.Parameter(tensor, requires_grad=layout.dtype.is_floating_point)


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Within it a module has another function under a name."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def plan_saving(model: Any, directory: Path, settings: Mapping[str, Any]) -> SavePlan:
    """Run `save_pretrained` of a model shaped as whole: it writes everything but the weights into the directory.

    `settings` are keyword arguments of `save_pretrained`.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from transformers import modeling_utils

    state: dict[str, torch.Tensor] = {}
    originals: dict[int, str] = {}
    for name, entry in state_entries(model).items():
        tensor = getattr(entry.module, entry.key)
        traced = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").as_subclass(_Traced)
        traced.sources = frozenset([entry.source])
        state[name], originals[id(traced)] = traced, entry.source
    files: list[SavedFile] = []
    made: list[tuple[str, torch.Tensor]] = []

    def record(tensors: dict[str, torch.Tensor], filename: str, metadata: dict[str, str]) -> None:
        kinds = {name: TensorKind(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        files.append(SavedFile(Path(filename).name, kinds, metadata))
        made.extend(tensors.items())

    # Tensors that share memory come into one file; those without data share it as those with data do, but have no address.
    split = functools.partial(
        split_state_dict_into_shards_factory,
        get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
        get_storage_id=lambda tensor: tensor.untyped_storage()._cdata,
    )
    held = list(state.values())  # no id is given twice
    save = inspect.unwrap(type(model).save_pretrained)  # transformers' own, also where a divided model has another
    with (
        _replaced(modeling_utils, "safe_save_file", record),
        _replaced(modeling_utils, "split_torch_state_dict_into_shards", split),
    ):
        save(model, directory, state_dict=state, **settings)
    return SavePlan(tuple(files), _conversions(made, {id(tensor): originals[id(tensor)] for tensor in held}))


def _conversions(made: list[tuple[str, torch.Tensor]], originals: Mapping[int, str]) -> tuple[Conversion, ...]:
    """What makes the saved tensors: each by itself, or those together that share a source."""
    conversions: list[Conversion] = []
    groups: list[tuple[set[str], list[str]]] = []
    for name, tensor in made:
        if id(tensor) in originals:
            conversions.append(Conversion((originals[id(tensor)],), (name,), as_it_is=True))
            continue
        assert isinstance(tensor, _Traced)
        sources, saved = set(tensor.sources), [name]
        for other in [group for group in groups if group[0] & sources]:
            sources |= other[0]
            saved = other[1] + saved
            groups.remove(other)
        groups.append((sources, saved))
    conversions += [Conversion(tuple(sorted(sources)), tuple(saved), as_it_is=False) for sources, saved in groups]
    place = {name: number for number, (name, _) in enumerate(made)}
    return tuple(sorted(conversions, key=lambda conversion: place[conversion.saved[0]]))
