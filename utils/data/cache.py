"""Directories of the cache: each made once, by one process, and complete or not there at all."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from utils.errors import UserError


def make_once(directory: Path, write: Callable[[Path], None], say: Callable[[str], None]) -> None:
    """Make a directory with `write`, which gets an empty one to fill, unless it is there already.

    Of several processes that want the same one, such as the workers of a run, the first makes it and the others wait.

    Raises:
        UserError: the directory above it cannot be used.
    """
    if directory.exists():
        return
    # The system takes the lock back from a process that ends, however it ends.
    lock = FileLock(directory.with_name(f".{directory.name}.lock"))
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"Another process is making {directory}: waiting for it.")
            lock.acquire()
    except OSError as error:
        raise _unusable(directory.parent, error) from error
    try:
        if not directory.exists():
            write_atomically(directory, write)
    finally:
        lock.release()


def write_atomically(directory: Path, write: Callable[[Path], None]) -> None:
    """Make a directory complete or not at all, also when two runs make it at once."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=directory.name + ".", dir=directory.parent))
        temporary.chmod(0o755)  # a cache may be shared
    except OSError as error:
        raise _unusable(directory.parent, error) from error
    try:
        write(temporary)
        temporary.rename(directory)
    except OSError:
        if not directory.exists():  # else another run was faster, with the same content
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unusable(cache: Path, error: OSError) -> UserError:
    return UserError(f"run.cache_directory: {cache} cannot be used: {error.strerror}")
