"""Files and directories that a script makes, where several workers run the script.

- Only worker 0 appends to files: logs have each line once. The other workers write such lines nowhere.
- Of equal calls of `os.mkdir` on all workers, the first one makes the directory and decides about an error.
- `torch.save` writes under another name first, so that a file is complete whenever any worker reads it.
- A model that is not sharded is saved by the first worker that comes to `save_pretrained`; the others wait for it.

No worker waits for one that has not come to the call: a function that only some workers call does not hang.
"""

import contextlib
import functools
import os
import stat
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed.distributed_c10d import _get_default_store

from moreh.errors import WorkerError
from moreh.patches.script_files import install_script_files
from moreh.runtime.sharding.local_weights import with_target_dtypes

# How long a worker may take for a call that it has begun, before the others do without its result.
TIMEOUT = timedelta(hours=1)
DONE = "done"


class SharedCalls:
    """Equal calls of several workers, of which the first one decides: a store, and how often this worker has called."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._calls: Counter[str] = Counter()
        self._pid = os.getpid()

    def are_here(self) -> bool:
        """Whether this is the worker's own process: one that it has forked must not use its connection."""
        return os.getpid() == self._pid

    def first(self, key: str, call: Callable[[], Any]) -> str | None:
        """Make the call on the worker that comes first, and wait for it on the others.

        Returns None on the first one. On the others `DONE`, or the error that the first one had: its number if it is
        one of the operating system, else its text.
        """
        name = f"moreh-files/{key}/{self._calls[key]}"
        self._calls[key] += 1
        if self._store.add(name, 1) == 1:
            outcome = "interrupted"
            try:
                call()
                outcome = DONE
            except Exception as error:
                number = getattr(error, "errno", None)
                outcome = f"{number}" if isinstance(error, OSError) and number else f"{type(error).__name__}: {error}"
                raise
            finally:
                self._store.set(f"{name}/outcome", outcome)
            return None
        self._store.wait([f"{name}/outcome"], TIMEOUT)
        return str(self._store.get(f"{name}/outcome").decode())


def share_script_files(rank: int) -> None:
    """Let the files that the script makes from now on be those of one process, on each of several workers."""
    calls = SharedCalls(_get_default_store())
    install_script_files(
        functools.partial(_make_open, rank),
        functools.partial(_make_mkdir, calls),
        functools.partial(_make_save, rank),
        functools.partial(_make_save_pretrained, calls),
    )


def _make_open(rank: int, original: Any) -> Any:
    @functools.wraps(original)
    def open_file(file: Any, mode: Any = "r", *args: Any, **kwargs: Any) -> Any:
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


def _make_mkdir(calls: SharedCalls, original: Any) -> Any:
    @functools.wraps(original)
    def mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
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
                with with_target_dtypes(self):
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
