"""Directories of the cache: each is made once, by one process, and is complete or absent."""

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from moreh.atomic_io import commit_directory, make_staging_directory
from utils.errors import UserError


def make_once(directory: Path, write: Callable[[Path], None], info: Callable[[str], None]) -> None:
    """Make a directory with `write`, which fills an empty one, unless it exists.

    If several processes want the same directory, such as the workers of a run, the first one makes it and the others
    wait. `info` gets a line about the wait.

    Raises:
        UserError: the parent directory cannot be used.
    """
    if directory.exists():
        return
    # The operating system releases the lock of a process that ends, however it ends.
    lock = FileLock(directory.with_name(f".{directory.name}.lock"))
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            info(f"Another process is making {directory}: waiting for it.")
            lock.acquire()
    except OSError as error:
        raise _cache_error(directory.parent, error) from error
    try:
        if not directory.exists():
            write_atomically(directory, write)
    finally:
        lock.release()


def write_atomically(directory: Path, write: Callable[[Path], None]) -> None:
    """Make a directory that is complete or absent, even if two runs make it at the same time."""
    try:
        staging = make_staging_directory(directory, shared=True)
    except OSError as error:
        raise _cache_error(directory.parent, error) from error
    try:
        write(staging)
        commit_directory(staging, directory, replace=False, durable=False)
    except OSError:
        if not directory.exists():  # otherwise another run was faster, with the same content
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _cache_error(cache: Path, error: OSError) -> UserError:
    return UserError(f"run.cache_directory: {cache} cannot be used: {error.strerror}")
