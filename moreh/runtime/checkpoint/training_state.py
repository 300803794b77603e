"""Checkpoints of a training, with torch.distributed.checkpoint: saved under one plan, resumed under any other.

On the disk are whole tensors in pieces, under the parameters' names: nothing there depends on the plan or the number of
workers, and one worker alone (`mesh` None, no process group) writes the same. All ranks must reach the directory.
"""

import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from moreh.errors import MorehError, WorkerError
from moreh.runtime.checkpoint.atomic_dir import publish_directory, unfinished_directory, unfinished_name
from moreh.runtime.checkpoint.dcp_tensors import (
    RestoringPlanner,
    StoredTensor,
    StoringPlanner,
    stored_part,
    stored_value,
    stored_whole,
    value_of,
)
from moreh.runtime.checkpoint.optimizer_state import (
    CheckpointError,
    check_groups,
    groups_of,
    optimizer_state_to_save,
    restore_optimizer,
    state_to_fill,
)
from moreh.runtime.launch.collective_errors import raise_on_all_ranks
from moreh.runtime.sharding.mesh import Mesh
from moreh.runtime.sharding.shards import check_local_tensors, global_rank_of
from moreh.runtime.sharding.spec import ParamSpec

# What a rank holds of a training's state, by the names on the disk.
State = dict[str, StoredTensor]
# Before parameters' names; then what rank 0 alone writes.
_MODEL, _OPTIMIZER = "model/", "optimizer/{}/"
_GROUPS, _EXTRA = "groups", "extra"

# One save after the other, so that their collectives do not meet.
_saver = ThreadPoolExecutor(1, thread_name_prefix="moreh-checkpoint")
_running: list[Future[None]] = []


def layouts_of_whole(model: nn.Module) -> dict[str, ParamSpec]:
    """The layouts of a model that one worker holds."""
    return {name: ParamSpec(name, tuple(tensor.shape), tensor.dtype, (0,)) for name, tensor in model.named_parameters()}


def state_to_save(
    layouts: Mapping[str, ParamSpec],
    local_tensors: Mapping[str, torch.Tensor],
    optimizers: Sequence[Optimizer],
    parameters: Mapping[str, nn.Parameter],
    mesh: Mesh | None,
    extra: Any = None,
) -> State:
    """What this rank holds of a training: views of the tensors, no copies; collective.

    `parameters` are those that the optimizers have, by the names of the layouts. `extra` is rank 0's: the scheduler's state,
    random states, the step, the position in the data; numbers, strings, tensors, and lists, tuples and dicts of them.

    Raises:
        CheckpointError: an optimizer has state that cannot be cut as its parameter is (Adafactor's), on a divided parameter.
        TypeError: `extra` has other things in it.
        WorkerError: another rank failed.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = [_gather_names(groups_of(optimizer, names), mesh) for optimizer in optimizers]
    state: State = {}
    error: Exception | None = None
    try:
        check_local_tensors(layouts, local_tensors, mesh)
        for name, tensor in local_tensors.items():
            state[_MODEL + name] = stored_part(layouts[name], tensor.detach(), mesh)
        for number, optimizer in enumerate(optimizers):
            for path, stored in optimizer_state_to_save(optimizer, names, layouts, mesh).items():
                state[_OPTIMIZER.format(number) + path] = stored
        if global_rank_of(mesh) == 0:
            state[_GROUPS] = stored_value(groups, "the settings of an optimizer")
            state[_EXTRA] = stored_value(extra, "extra")
    except Exception as raised:
        error = raised
    _raise_together(error, "collecting the state of the training", mesh)
    return state


def save_state(state: State, directory: str | os.PathLike[str], mesh: Mesh | None) -> None:
    """Write a state; collective. Afterwards it is on the disk.

    The directory is complete or absent: it is written under another name and renamed by rank 0 when all ranks have written
    and flushed their parts; an older one is replaced. Where a rank fails, all raise and an older one stays.

    Raises:
        WorkerError: another rank failed; the failed rank itself raises its own error, such as OSError.
    """
    _start(state, directory, mesh).result()


def save_state_async(state: State, directory: str | os.PathLike[str], mesh: Mesh | None) -> Future[None]:
    """Copy a state into the processor's memory and write it while training goes on; collective.

    What is written is the state at the moment of the call; this needs memory for a copy of what the rank holds, and waits
    for an earlier save to end. The result of the future is there, and the directory has its name, once all ranks are done:
    it is complete or absent as with `save_state`, also if the processes end before. Ask for the result, which raises what went
    wrong, before the process group is destroyed.
    """
    while _running:
        _running.pop().exception()
    copied = {name: stored.copied() for name, stored in state.items()}
    future = _start(copied, directory, mesh)
    _running.append(future)
    return future


def load_state(
    directory: str | os.PathLike[str],
    layouts: Mapping[str, ParamSpec],
    local_tensors: Mapping[str, torch.Tensor],
    optimizers: Sequence[Optimizer],
    parameters: Mapping[str, nn.Parameter],
    mesh: Mesh | None,
) -> Any:
    """Read what `state_to_save` described, under whatever plan, into local tensors and optimizers; collective.

    The arguments are as there. An optimizer need not have made a step. Returns `extra`, on all ranks.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is of another model or of other optimizers.
        WorkerError: another rank failed.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    state: State = {}
    fillings: list[dict[str, torch.Tensor]] = []
    error: Exception | None = None
    try:
        check_local_tensors(layouts, local_tensors, mesh)
        metadata = _read_metadata(Path(directory))
        sizes = {
            name: kind for name, kind in metadata.state_dict_metadata.items() if isinstance(kind, TensorStorageMetadata)
        }
        _check_model(Path(directory), sizes, layouts)
        for name, tensor in local_tensors.items():
            state[_MODEL + name] = stored_part(layouts[name], tensor.detach(), mesh)
        for number, optimizer in enumerate(optimizers):
            prefix = _OPTIMIZER.format(number)
            saved: dict[str, dict[str, TensorStorageMetadata]] = {}
            for path, kind in sizes.items():
                if path.startswith(prefix):
                    name, _, key = path.removeprefix(prefix).partition("/")
                    saved.setdefault(name, {})[key] = kind
            filled = state_to_fill(optimizer, names, layouts, saved, mesh)
            state |= {prefix + path: stored for path, (stored, _) in filled.items()}
            fillings.append({path: tensor for path, (_, tensor) in filled.items()})
        values = {name: torch.empty(sizes[name].size, dtype=torch.uint8) for name in (_GROUPS, _EXTRA)}
        state |= {name: stored_whole(tensor) for name, tensor in values.items()}
    except Exception as raised:
        error = raised
    doing = f"resuming from {directory}"
    _raise_together(error, doing, mesh)
    # The settings first: what does not fit is refused before anything is changed.
    _read({_GROUPS: state.pop(_GROUPS)}, directory, mesh, doing)
    groups = value_of(values[_GROUPS])
    try:
        if len(groups) != len(optimizers):
            raise CheckpointError(
                f"{directory} has the state of {len(groups)} optimizers, and {len(optimizers)} were given."
            )
        for optimizer, saved_groups in zip(optimizers, groups, strict=True):
            check_groups(optimizer, names, saved_groups)
    except Exception as raised:
        error = raised
    _raise_together(error, doing, mesh)
    _read(state, directory, mesh, doing)
    for optimizer, saved_groups, tensors in zip(optimizers, groups, fillings, strict=True):
        restore_optimizer(optimizer, names, saved_groups, tensors)
    return value_of(values[_EXTRA])


def load_extra(directory: str | os.PathLike[str]) -> Any:
    """Read only `extra` of what `state_to_save` described; each rank by itself.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    kind = _read_metadata(Path(directory)).state_dict_metadata[_EXTRA]
    assert isinstance(kind, TensorStorageMetadata)
    value = torch.empty(kind.size, dtype=torch.uint8)
    _read({_EXTRA: stored_whole(value)}, directory, None, f"resuming from {directory}")
    return value_of(value)


def _raise_together(error: Exception | None, doing: str, mesh: Mesh | None) -> None:
    if mesh is not None:
        raise_on_all_ranks(error, doing, mesh.device)
    elif error is not None:
        raise error


def _gather_names(groups: list[dict[str, Any]], mesh: Mesh | None) -> list[dict[str, Any]]:
    """This rank's groups with the parameters' names of all ranks, since stages have different ones."""
    if mesh is None:
        return groups
    names = [group["names"] for group in groups]
    gathered: list[list[list[str]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, names)
    return [
        {"settings": group["settings"], "names": sorted({name for ranks in gathered for name in ranks[number]})}
        for number, group in enumerate(groups)
    ]


def _read_metadata(directory: Path) -> Metadata:
    try:
        return FileSystemReader(directory).read_metadata()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory} has no complete checkpoint of a training: {error}. Give another directory."
        ) from error
    except Exception as error:  # whatever unpickling a damaged file raises
        raise _damaged(directory, error) from error


def _damaged(directory: Path, error: Exception) -> CheckpointError:
    told = " ".join(str(error).split())[:300]
    return CheckpointError(f"{directory} is damaged ({type(error).__name__}: {told}). Give an earlier checkpoint.")


def _check_model(directory: Path, sizes: Mapping[str, TensorStorageMetadata], layouts: Mapping[str, ParamSpec]) -> None:
    saved = {name.removeprefix(_MODEL): tuple(kind.size) for name, kind in sizes.items() if name.startswith(_MODEL)}
    problems = [f"{name} is not in it" for name in layouts if name not in saved]
    problems += [f"{name} is not in this model" for name in saved if name not in layouts]
    problems += [
        f"{name} is {list(size)}, here {list(layouts[name].shape)}"
        for name, size in saved.items()
        if name in layouts and size != layouts[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{directory} is a checkpoint of another model: {'; '.join(problems[:5])}{more}.")


@cache
def _background_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of all ranks for the thread that saves: collectives of two threads must not be in one group."""
    return dist.new_group(backend="gloo")


def _start(state: State, directory: str | os.PathLike[str], mesh: Mesh | None) -> Future[None]:
    group = None
    if mesh is not None:
        world = dist.group.WORLD
        assert world is not None
        group = _background_group(world)
    return _saver.submit(_write, state, Path(directory), global_rank_of(mesh) == 0, group)


def _write(state: State, target: Path, first: bool, group: dist.ProcessGroup | None) -> None:
    """Write and publish a state; on all ranks of the group. `first` is rank 0."""
    doing = f"saving the state of the training to {target}"
    unfinished = unfinished_name(target)
    try:
        _together(lambda: unfinished_directory(target) if first else None, doing, group)
        _quietly_alone(group is None)
        writer = FileSystemWriter(unfinished)
        try:
            save(state, storage_writer=writer, planner=StoringPlanner(), process_group=group, no_dist=group is None)
        except CheckpointException as raised:
            raise _own_error(raised, 0 if group is None else dist.get_rank(group), doing) from raised
        _together(lambda: publish_directory(unfinished, target) if first else None, doing, group)
    finally:
        if first:
            shutil.rmtree(unfinished, ignore_errors=True)


def _together(work: Callable[[], object], doing: str, group: dist.ProcessGroup | None) -> None:
    """Do something on the ranks of a group; if it fails on one, raise on all."""
    error: Exception | None = None
    try:
        work()
    except Exception as raised:
        error = raised
    if group is not None:
        raise_on_all_ranks(error, doing, group=group)
    elif error is not None:
        raise error


def _read(state: State, directory: str | os.PathLike[str], mesh: Mesh | None, doing: str) -> None:
    reader = FileSystemReader(directory)
    _quietly_alone(mesh is None)
    try:
        load(state, storage_reader=reader, planner=RestoringPlanner(), no_dist=mesh is None)
    except CheckpointException as raised:
        error = _own_error(raised, global_rank_of(mesh), doing)
        raise error if isinstance(error, MorehError) else _damaged(Path(directory), error) from raised


def _quietly_alone(alone: bool) -> None:
    if alone:
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _own_error(failed: CheckpointException, rank: int, doing: str) -> Exception:
    """What this rank failed with, or a WorkerError about another one; torch's own error is no Exception."""
    own = failed.failures.get(rank)
    if own is not None and isinstance(own[0], Exception):
        return own[0]
    other, (error, _) = next(iter(failed.failures.items()))
    return WorkerError(
        f"Rank {other} failed while {doing}, so all ranks stop. Its error: {type(error).__name__}: {error}"
    )
