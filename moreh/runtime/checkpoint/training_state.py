"""Checkpoints of a training run: saved under one plan, resumed under any other.

A checkpoint has chunks of full tensors under the parameters' names. Nothing in it depends on the plan or the number of
ranks: a process that trains alone (`mesh` None, no process group) writes the same. All ranks must reach the directory.

Why not `get_state_dict` and `set_state_dict` of torch.distributed.checkpoint with the DTensors that the script sees
(checked with torch 2.13):
- A DTensor has one contiguous range per rank and dimension. A rank's columns of GPT-2's c_attn are three ranges, so the
  DTensor shows them regrouped. Its checkpoint is silently wrong under another size of tensor parallelism.
  `_StridedShard` cannot describe chunks of unequal sizes (grouped-query attention), and DCP writes even equal ones as
  one range.
- On a pipeline rank the model has the parameters of all stages; those of other stages are meta tensors.
  `get_state_dict` returns the meta tensors too, and DCP fails to copy them.
- `get_state_dict` makes a step with an optimizer that has no state yet, so that the optimizer resumes at step 1, not 0.
- This module refuses a checkpoint that does not fit before anything is changed, on all ranks, and says what to do.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from moreh.errors import CheckpointError
from moreh.runtime.checkpoint.dcp_io import State, read_metadata, read_state
from moreh.runtime.checkpoint.dcp_tensors import chunks_of_full, chunks_of_local, chunks_of_object, object_of_bytes
from moreh.runtime.checkpoint.optimizer_state import (
    allocate_optimizer_state,
    check_param_groups,
    collect_optimizer_state,
    param_groups_of,
    restore_optimizer,
)
from moreh.runtime.launch.collective_errors import failing_together
from moreh.runtime.sharding.mesh import Mesh
from moreh.runtime.sharding.shards import check_local_tensors, global_rank_of
from moreh.runtime.sharding.spec import ParamSpec

# Names on the disk: the prefixes of parameters' names, and the two objects that rank 0 writes.
_MODEL, _OPTIMIZER = "model/", "optimizer/{}/"
_GROUPS, _EXTRA = "groups", "extra"


def unsharded_specs(model: nn.Module) -> dict[str, ParamSpec]:
    """The specs of a model in a process that trains alone."""
    return {name: ParamSpec(name, tuple(tensor.shape), tensor.dtype, (0,)) for name, tensor in model.named_parameters()}


def collect_training_state(
    specs: Mapping[str, ParamSpec],
    local_tensors: Mapping[str, torch.Tensor],
    optimizers: Sequence[Optimizer],
    parameters: Mapping[str, nn.Parameter],
    mesh: Mesh | None,
    extra: Any = None,
    without: Collection[str] = (),
) -> State:
    """This rank's part of a training state, as views of its tensors; collective.

    Args:
        specs: the specs of the model's parameters, by name.
        local_tensors: the local tensors of the parameters that this rank holds, by the same names.
        optimizers: the optimizers of the training run.
        parameters: the parameters that the optimizers have, by the same names.
        mesh: the ranks; None in a process that trains alone.
        extra: whatever else rank 0 stores, such as the scheduler's state, random states, the step and the position in
            the data. It may consist of numbers, strings, tensors, and lists, tuples and dicts of them.
        without: the names of parameters that are left out.

    Raises:
        CheckpointError: an optimizer has state that cannot be sharded as its parameter is, such as row variances.
        TypeError: `extra` has something else in it.
        WorkerError: another rank failed.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = [_with_names_of_all_ranks(param_groups_of(optimizer, names), mesh) for optimizer in optimizers]
    state: State = {}
    with _together("collecting the state of the training", mesh):
        state |= _model_chunks(specs, local_tensors, mesh, without)
        for index, optimizer in enumerate(optimizers):
            prefix = _OPTIMIZER.format(index)
            optimizer_chunks = collect_optimizer_state(optimizer, names, specs, mesh)
            state |= {prefix + path: chunks for path, chunks in optimizer_chunks.items()}
        if global_rank_of(mesh) == 0:
            state[_GROUPS] = chunks_of_object(groups, "the settings of an optimizer")
            state[_EXTRA] = chunks_of_object(extra, "extra")
    return state


def load_training_state(
    directory: str | os.PathLike[str],
    specs: Mapping[str, ParamSpec],
    local_tensors: Mapping[str, torch.Tensor],
    optimizers: Sequence[Optimizer],
    parameters: Mapping[str, nn.Parameter],
    mesh: Mesh | None,
    keep: Collection[str] = (),
    without: Collection[str] = (),
) -> Any:
    """Load a state of `collect_training_state`, under any plan, into local tensors and optimizers; collective.

    The arguments are those of `collect_training_state`. The optimizers need not have made a step; of their groups, the
    settings that `keep` names stay as they are, as do the parameters that `without` names.
    Returns `extra` on all ranks.

    Raises:
        CheckpointError: there is no complete checkpoint, or the checkpoint is of another model or other optimizers.
        WorkerError: another rank failed.
    """
    directory = Path(directory)
    action = f"resuming from {directory}"
    names = {id(parameter): name for name, parameter in parameters.items()}
    state: State = {}
    optimizer_tensors: list[dict[str, torch.Tensor]] = []
    with _together(action, mesh):
        state |= _model_chunks(specs, local_tensors, mesh, without)
        saved = _saved_tensors(directory, _GROUPS, _EXTRA)
        _check_model(directory, saved, {name: spec for name, spec in specs.items() if name not in without})
        for index, optimizer in enumerate(optimizers):
            prefix = _OPTIMIZER.format(index)
            allocated = allocate_optimizer_state(optimizer, names, specs, _by_parameter(saved, prefix), mesh)
            state |= {prefix + path: chunks for path, (chunks, _) in allocated.items()}
            optimizer_tensors.append({path: tensor for path, (_, tensor) in allocated.items()})
        groups_bytes, extra_bytes = (torch.empty(saved[name].size, dtype=torch.uint8) for name in (_GROUPS, _EXTRA))
        state[_EXTRA] = chunks_of_full(extra_bytes)
    # The groups first, so that optimizers that do not fit are refused before anything is changed.
    read_state({_GROUPS: chunks_of_full(groups_bytes)}, directory, mesh, action)
    groups = _object(groups_bytes, directory)
    with _together(action, mesh):
        if len(groups) != len(optimizers):
            raise CheckpointError(
                f"{directory} has the state of {len(groups)} optimizers, and {len(optimizers)} were given. Give the "
                "optimizers of the training run that wrote the checkpoint."
            )
        for optimizer, saved_groups in zip(optimizers, groups, strict=True):
            check_param_groups(optimizer, names, saved_groups)
    read_state(state, directory, mesh, action)
    for optimizer, saved_groups, tensors in zip(optimizers, groups, optimizer_tensors, strict=True):
        restore_optimizer(optimizer, names, saved_groups, tensors, keep)
    return _object(extra_bytes, directory)


def load_extra(directory: str | os.PathLike[str]) -> Any:
    """Read only `extra` of a state of `collect_training_state`. Not collective.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    directory = Path(directory)
    extra_bytes = torch.empty(_saved_tensors(directory, _EXTRA)[_EXTRA].size, dtype=torch.uint8)
    read_state({_EXTRA: chunks_of_full(extra_bytes)}, directory, None, f"resuming from {directory}")
    return _object(extra_bytes, directory)


def _object(elements: torch.Tensor, directory: Path) -> Any:
    """The object of these bytes of a checkpoint.

    Raises:
        CheckpointError: torch.load cannot read it, or it would run code.
    """
    try:
        return object_of_bytes(elements)
    except Exception as error:  # torch.load raises many types for damaged bytes
        raise CheckpointError(
            f"{directory} is damaged, or runs code ({type(error).__name__}: {' '.join(str(error).split())[:200]}). "
            "Give an earlier checkpoint."
        ) from error


def _together(action: str, mesh: Mesh | None) -> AbstractContextManager[None]:
    """A block that fails on all ranks if it fails on one of them."""
    return nullcontext() if mesh is None else failing_together(action, device=mesh.device)


def _model_chunks(
    specs: Mapping[str, ParamSpec],
    local_tensors: Mapping[str, torch.Tensor],
    mesh: Mesh | None,
    without: Collection[str],
) -> State:
    check_local_tensors(specs, local_tensors, mesh)
    kept = {name: local.detach() for name, local in local_tensors.items() if name not in without}
    return {_MODEL + name: chunks_of_local(specs[name], local, mesh) for name, local in kept.items()}


def _with_names_of_all_ranks(groups: list[dict[str, Any]], mesh: Mesh | None) -> list[dict[str, Any]]:
    """This rank's groups with the names of all ranks, since pipeline stages have different parameters; collective."""
    if mesh is None:
        return groups
    names_of_ranks: list[list[list[str]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(names_of_ranks, [group["names"] for group in groups])
    return [
        {**group, "names": sorted({name for names in names_of_ranks for name in names[index]})}
        for index, group in enumerate(groups)
    ]


def _saved_tensors(directory: Path, *needed: str) -> dict[str, TensorStorageMetadata]:
    """The tensors of a checkpoint, by their names on the disk.

    Raises:
        CheckpointError: there is no complete checkpoint, or it has none of a needed name.
    """
    metadata = read_metadata(directory).state_dict_metadata
    tensors = {name: entry for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise CheckpointError(f"{directory} is damaged (it has no {missing[0]}). Give an earlier checkpoint.")
    return tensors


def _by_parameter(
    saved: Mapping[str, TensorStorageMetadata], prefix: str
) -> dict[str, dict[str, TensorStorageMetadata]]:
    """The saved state of an optimizer, by parameter and key."""
    by_parameter: dict[str, dict[str, TensorStorageMetadata]] = {}
    for path, metadata in saved.items():
        if path.startswith(prefix):
            name, _, key = path.removeprefix(prefix).partition("/")
            by_parameter.setdefault(name, {})[key] = metadata
    return by_parameter


def _check_model(directory: Path, saved: Mapping[str, TensorStorageMetadata], specs: Mapping[str, ParamSpec]) -> None:
    sizes = {name.removeprefix(_MODEL): tuple(entry.size) for name, entry in saved.items() if name.startswith(_MODEL)}
    problems = [f"{name} is not in it" for name in specs if name not in sizes]
    problems += [f"{name} is not in this model" for name in sizes if name not in specs]
    problems += [
        f"{name} is {list(size)}, here {list(specs[name].shape)}"
        for name, size in sizes.items()
        if name in specs and size != specs[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{directory} is a checkpoint of another model: {'; '.join(problems[:5])}{more}. Give a checkpoint of this "
            "model."
        )
