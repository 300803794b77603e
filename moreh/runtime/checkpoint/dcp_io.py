"""Writes states with torch.distributed.checkpoint (DCP), in the background and atomically, and reads them."""

import os
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from moreh.atomic_io import commit_directory, make_staging_directory, staging_path
from moreh.errors import CheckpointError, MorehError, WorkerError
from moreh.runtime.checkpoint.dcp_files import ChecksumWriter, SafeReader
from moreh.runtime.checkpoint.dcp_tensors import ChunkLoadPlanner, ChunkSavePlanner, TensorChunks
from moreh.runtime.checkpoint.manifest import FileSum, Manifest, read_manifest, write_manifest
from moreh.runtime.launch.collective_errors import failing_together
from moreh.runtime.sharding.mesh import Mesh
from moreh.runtime.sharding.shards import global_rank_of

# What a rank holds of a training state, by the names on the disk.
State = dict[str, TensorChunks]

# One thread, because the collectives of two saves must not interleave.
_saver = ThreadPoolExecutor(1, thread_name_prefix="moreh-checkpoint")
_last_save: Future[None] | None = None


def save_state_async(
    state: State, directory: str | os.PathLike[str], mesh: Mesh | None, about: Mapping[str, Any] | None = None
) -> Future[None]:
    """Copy a state to CPU memory and write it in the background; collective. The manifest has rank 0's `about`.

    - The state at the moment of the call is written. This needs CPU memory for a copy of what the rank holds.
    - The call waits for an earlier save to end.
    - The directory is complete or absent, even if the processes are killed: it is written under another name, and rank
      0 renames it when all ranks have written and flushed their files. Only then is an older directory replaced. If a
      rank fails, the older directory stays.
    - The future is done once all ranks are. Call its `result()`, which raises the error of a failed save, before the
      process group is destroyed.

    Raises (from the future's result):
        WorkerError: another rank failed. The rank that failed raises its own error, such as OSError.
    """
    global _last_save
    if _last_save is not None:
        _last_save.exception()
        _last_save = None
    copied = {name: chunks.clone_to_cpu() for name, chunks in state.items()}
    group = None
    if mesh is not None:
        world = dist.group.WORLD
        assert world is not None
        group = _background_group(world)
    _last_save = _saver.submit(_write, copied, Path(directory), about or {}, global_rank_of(mesh) == 0, group)
    return _last_save


@cache
def _background_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of all ranks for the thread that saves, because collectives of two threads must not share a group."""
    return dist.new_group(backend="gloo")


def _write(
    state: State, target: Path, about: Mapping[str, Any], is_rank0: bool, group: dist.ProcessGroup | None
) -> None:
    """Write a state and rename its directory; collective. `group` is None for a process that trains alone."""
    action = f"saving the state of the training to {target}"
    staging = staging_path(target)

    def together() -> AbstractContextManager[None]:
        return nullcontext() if group is None else failing_together(action, group=group)

    try:
        with together():
            if is_rank0:
                make_staging_directory(target)
        if group is None:
            _ignore_no_dist_warning()
        writer = ChecksumWriter(staging)
        try:
            save(state, storage_writer=writer, planner=ChunkSavePlanner(), process_group=group, no_dist=group is None)
        except CheckpointException as failure:
            raise _error_of_this_rank(failure, 0 if group is None else dist.get_rank(group), action) from failure
        sums = _sums_of_all_ranks(writer.sums, group)
        with together():
            if is_rank0:
                write_manifest(staging, Manifest(sums, about))
                commit_directory(staging, target)
    finally:
        if is_rank0:
            shutil.rmtree(staging, ignore_errors=True)


def _sums_of_all_ranks(sums: dict[str, FileSum], group: dist.ProcessGroup | None) -> dict[str, FileSum]:
    """The checksums of the files of all ranks, on rank 0; collective."""
    if group is None:
        return sums
    of_ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(of_ranks, sums, group=group)
    return {name: file for of_rank in of_ranks for name, file in of_rank.items()}


def read_state(state: State, directory: Path, mesh: Mesh | None, action: str) -> None:
    """Fill a state's chunks from a directory; collective.

    Raises:
        CheckpointError: the files are damaged.
        WorkerError: another rank failed.
    """
    reader = _reader(directory)
    if mesh is None:
        _ignore_no_dist_warning()
    try:
        load(state, storage_reader=reader, planner=ChunkLoadPlanner(), no_dist=mesh is None)
    except CheckpointException as failure:
        error = _error_of_this_rank(failure, global_rank_of(mesh), action)
        raise error if isinstance(error, MorehError) else _damaged(directory, error) from failure


def read_metadata(directory: Path) -> Metadata:
    """The names, sizes and chunks of a directory's tensors. Not collective.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    try:
        return _reader(directory).read_metadata()
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory} has no complete checkpoint of a training run: {error}. Give another directory."
        ) from error
    except Exception as error:  # unpickling a damaged file raises errors of many types
        raise _damaged(directory, error) from error


def _reader(directory: Path) -> SafeReader:
    return SafeReader(directory, read_manifest(directory).files)


def _damaged(directory: Path, error: Exception) -> CheckpointError:
    message = " ".join(str(error).split())[:300]
    return CheckpointError(f"{directory} is damaged ({type(error).__name__}: {message}). Give an earlier checkpoint.")


def _ignore_no_dist_warning() -> None:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _error_of_this_rank(failure: CheckpointException, rank: int, action: str) -> Exception:
    """This rank's own error, else a WorkerError about another rank's. A CheckpointException is not an Exception."""
    own = failure.failures.get(rank)
    if own is not None and isinstance(own[0], Exception):
        return own[0]
    other_rank, (error, _) = next(iter(failure.failures.items()))
    return WorkerError(
        f"Rank {other_rank} failed while {action}, so all ranks stop. Its error: {type(error).__name__}: {error}"
    )
