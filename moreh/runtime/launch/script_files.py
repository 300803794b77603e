"""Files and directories that a script creates when several workers run it.

- Only worker 0 appends to files: logs have each line once. The other workers write such lines nowhere.
- A file that the script writes (`"w"`) is written by the worker that comes first, for which the others wait when they
  close it (`written_files.py`).
- A file that the script opens as a new one (`"x"`) is made by the worker that comes first.
- Of equal calls of `os.mkdir` on all workers, the first one makes the directory and decides about an error.
- A script's calls of `os.remove`, `os.rename`, `os.replace` and `shutil.rmtree` are made once, when all workers have
  come to them (`removals.py`).
- `torch.save` writes under another name first, so that a file is complete whenever any worker reads it.
- A model that is not sharded is saved by the first worker that comes to `save_pretrained`; the others wait for it.

No worker waits for long for one that has not come to the call: a function that only some workers call does not hang.
"""

import contextlib
import functools
import os
import stat
import sys
from pathlib import Path
from typing import Any

from torch.distributed.distributed_c10d import _get_default_store

from moreh.errors import WorkerError
from moreh.patches.several_workers.script_files import install_script_files
from moreh.runtime.launch.removals import Removals, is_called_by_script, is_called_by_tempfile, make_removal
from moreh.runtime.launch.shared_calls import DONE, SharedCalls
from moreh.runtime.launch.world import World
from moreh.runtime.launch.written_files import is_written_whole, open_once
from moreh.runtime.sharding.local_weights import converted_parameters


def share_script_files(world: World) -> None:
    """Let the files that the script makes from now on be those of one process, on each of several workers."""
    calls, private = SharedCalls(_get_default_store()), set[str]()
    rank, one_machine = world.rank, world.local_size == world.size
    install_script_files(
        functools.partial(_make_open, rank, calls, one_machine=one_machine),
        functools.partial(_make_mkdir, calls, private),
        functools.partial(make_removal, Removals(calls, private, world.size, one_machine=one_machine)),
        functools.partial(_make_save, rank),
        functools.partial(_make_save_pretrained, calls),
    )


def _make_open(rank: int, calls: SharedCalls, original: Any, *, one_machine: bool) -> Any:
    @functools.wraps(original)
    def open_file(file: Any, mode: Any = "r", *args: Any, **kwargs: Any) -> Any:
        makes_new = isinstance(mode, str) and "x" in mode and isinstance(file, str | os.PathLike)
        if makes_new and calls.are_here() and is_called_by_script(sys._getframe(1)):
            return _new_file(calls, original, file, mode, *args, **kwargs)
        if one_machine and calls.are_here() and is_written_whole(file, mode, kwargs):
            return open_once(calls, rank, original, file, mode, *args, **kwargs)
        opened = original(file, mode, *args, **kwargs)
        only_appends = isinstance(mode, str) and "a" in mode and "+" not in mode
        if (
            rank == 0
            or not only_appends
            or isinstance(file, int)
            or not stat.S_ISREG(os.fstat(opened.fileno()).st_mode)
        ):
            return opened
        opened.close()
        return original(os.devnull, mode, *args, **kwargs)

    return open_file


def _new_file(calls: SharedCalls, original: Any, file: Any, mode: str, *args: Any, **kwargs: Any) -> Any:
    """A file that may not exist yet: the first worker creates it, and the writes of the others are discarded."""
    opened: list[Any] = []
    path = os.path.abspath(file)  # noqa: PTH100
    outcome = calls.first(f"open/{path}", lambda: opened.append(original(file, mode, *args, **kwargs)))
    if outcome is None:
        return opened[0]
    if outcome.isdecimal():
        raise OSError(int(outcome), os.strerror(int(outcome)), os.fspath(file))
    return original(os.devnull, mode.replace("x", "w"), *args, **kwargs)


def _make_mkdir(calls: SharedCalls, private: set[str], original: Any) -> Any:
    @functools.wraps(original)
    def mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        if not isinstance(path, bytes) and is_called_by_tempfile(sys._getframe(1)):
            private.add(os.path.abspath(path))  # noqa: PTH100
        if dir_fd is not None or not calls.are_here() or isinstance(path, bytes):
            original(path, mode, dir_fd=dir_fd)
            return
        key = f"mkdir/{os.path.abspath(path)}"  # noqa: PTH100  the name, without asking the file system
        outcome = calls.first(key, lambda: original(path, mode))
        if outcome == DONE:
            with contextlib.suppress(FileExistsError):
                original(path, mode)  # again, for it may be on another machine, or removed since
        elif outcome is not None and outcome.isdecimal():
            raise OSError(int(outcome), os.strerror(int(outcome)), os.fspath(path))
        elif outcome is not None:
            original(path, mode)

    return mkdir


def _make_save(rank: int, original: Any) -> Any:
    @functools.wraps(original)
    def save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(f, str | os.PathLike) or (Path(f).exists() and not Path(f).is_file()):
            return original(obj, f, *args, **kwargs)
        target = Path(os.path.realpath(f))
        # The file has its own name, which torch writes into it, in a directory of this worker's.
        unfinished = target.parent / f".{target.name}-unfinished-{rank}"
        try:
            if target.parent.is_dir():
                unfinished.mkdir(exist_ok=True)
            original(obj, unfinished / target.name, *args, **kwargs)
            (unfinished / target.name).replace(target)
        finally:
            with contextlib.suppress(OSError):
                (unfinished / target.name).unlink(missing_ok=True)
                unfinished.rmdir()
        return None

    return save


def _make_save_pretrained(calls: SharedCalls, original: Any) -> Any:
    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        def save() -> None:
            # transformers would leave it to worker 0, which may not have come yet.
            self.__dict__["should_save_on_this_rank"] = lambda is_main_process: is_main_process
            try:
                with converted_parameters(self):
                    results.append(original(self, save_directory, *args, **kwargs))
            finally:
                del self.__dict__["should_save_on_this_rank"]

        results: list[Any] = []
        if not calls.are_here():
            save()
            return results[0]
        outcome = calls.first(f"save_pretrained/{os.path.abspath(save_directory)}", save)  # noqa: PTH100
        if outcome not in (None, DONE):
            raise WorkerError(f"another worker failed while saving the model to {save_directory}: {outcome}")
        return results[0] if results else None

    return save_pretrained
