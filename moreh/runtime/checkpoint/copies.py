"""Copies files saved by rank 0 to directories with a different name on each rank, such as temporary ones."""

import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from moreh.errors import OptionError
from moreh.runtime.launch.collective_errors import failing_together


def copy_to_other_directories(directory: str | os.PathLike[str], device: torch.device) -> None:
    """Copy rank 0's directory to those of ranks that were given another one; collective.

    Raises:
        OptionError: a rank on another machine has no access to rank 0's directory.
    """
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, os.path.abspath(directory))  # noqa: PTH100  without asking the file system
    if len(set(names)) == 1:
        return
    rank = dist.get_rank()
    needs_copy = names[rank] != names[0] and names.index(names[rank]) == rank
    with failing_together("copying what was saved", device=device):
        if needs_copy and not Path(names[0]).is_dir():
            raise OptionError(
                f"worker 0 has saved to {names[0]}, and worker {rank} was given {names[rank]}: give all workers one "
                "directory, which all machines have"
            )
        if needs_copy:
            shutil.copytree(names[0], names[rank], dirs_exist_ok=True)
