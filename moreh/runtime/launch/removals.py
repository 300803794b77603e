"""Runs a script's removals and renamings once, when all workers that run the script have come to them.

A worker that comes alone goes ahead after a while, so one that never comes costs time and no more.
"""

import contextlib
import functools
import os
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from moreh.patches.cuda.caller_origin import is_user_file
from moreh.runtime.launch.shared_calls import DONE, SharedCalls

# How long the first worker waits for the others.
PATIENCE = timedelta(seconds=5)
_DESCRIPTORS = {"dir_fd", "src_dir_fd", "dst_dir_fd"}
_PYTHON = f"{sysconfig.get_paths()['stdlib']}{os.sep}"


@dataclass(frozen=True)
class Removals:
    """The state that the calls of this worker share."""

    calls: SharedCalls
    """The calls of all workers."""
    private: set[str]
    """Temporary directories, whose names only this worker knows."""
    workers: int
    """Number of workers."""
    one_machine: bool
    """True if all workers have the same files."""


def make_removal(removals: Removals, original: Any) -> Any:
    """A replacement for `os.remove`, `os.rename`, `shutil.rmtree` or the like."""

    @functools.wraps(original)
    def remove(*args: Any, **kwargs: Any) -> Any:
        paths = [os.path.abspath(path) for path in args if isinstance(path, str | os.PathLike)]  # noqa: PTH100
        # With the descriptor of a directory, it is a part of another call.
        is_shared = paths and removals.calls.are_here() and not kwargs.keys() & _DESCRIPTORS
        if not is_shared or _is_private(paths[0], removals.private) or not is_called_by_script(sys._getframe(1)):
            return original(*args, **kwargs)
        key = "/".join((original.__name__, *map(str, paths)))
        outcome = removals.calls.together(key, lambda: original(*args, **kwargs), removals.workers, PATIENCE)
        if outcome is None or (outcome == DONE and removals.one_machine):
            return None
        if outcome.isdecimal():
            raise OSError(int(outcome), os.strerror(int(outcome)), paths[0])
        with contextlib.suppress(FileNotFoundError):
            original(*args, **kwargs)
        return None

    return remove


def _is_private(path: str, private: set[str]) -> bool:
    """True if a path is of a temporary file or directory, whose name no other worker knows."""
    parents = Path(path).parents
    return str(parents[0]) == tempfile.gettempdir() or any(str(parent) in private for parent in (Path(path), *parents))


def is_called_by_script(frame: FrameType | None) -> bool:
    """True if the script has made a call, by itself or through Python's own modules but `tempfile`."""
    while frame is not None:
        file = frame.f_code.co_filename
        if is_user_file(file):
            return True
        is_python = file.startswith(("<frozen", _PYTHON)) and "site-packages" not in file
        if not is_python or file.endswith(f"{os.sep}tempfile.py"):
            return False
        frame = frame.f_back
    return False


def is_called_by_tempfile(frame: FrameType) -> bool:
    """True if Python's `tempfile` has made a call."""
    return frame.f_code.co_filename.endswith(f"{os.sep}tempfile.py")
