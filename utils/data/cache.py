"""The cache: directories that one process creates once, atomically, and that are verified before use."""

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from moreh.atomic_io import commit_directory, make_staging_directory
from moreh.errors import CheckpointError
from moreh.runtime.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    read_manifest,
    reason_against,
    sum_of_file,
    write_manifest,
)
from utils.errors import UserError, system_word

# Files up to this size are checked by their content: about a second for each GB. Of larger ones, by their size.
_MAX_SUMMED_BYTES = 2**32


def make_once(directory: Path, write: Callable[[Path], None], info: Callable[[str], None]) -> None:
    """Make a directory with `write`, which fills an empty one, unless it exists and its files are whole.

    If several processes want the same directory, such as the workers of a run, the first one makes it and the others
    wait. `info` gets a line about the wait, and about a damaged directory that is made anew. What processes that were
    killed have left of it is removed.

    Raises:
        UserError: the parent directory cannot be used, or the disk is full.
    """
    if find_damage(directory) is None:
        return
    # The operating system releases the lock of a process that ends, however it ends.
    lock = FileLock(directory.with_name(f".{directory.name}.lock"))
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            info(f"Another process is creating {directory}: waiting for it.")
            lock.acquire()
    except OSError as error:
        raise _cache_error(directory.parent, error) from error
    try:
        damage = find_damage(directory)
        if damage is not None:
            _remove(directory, damage, info)
            write_atomically(directory, write)
    finally:
        lock.release()


def write_atomically(directory: Path, write: Callable[[Path], None]) -> None:
    """Make a directory that is complete or absent, even if two runs make it at the same time.

    Raises:
        UserError: the files cannot be written.
    """
    try:
        staging = make_staging_directory(directory, shared=True)
        try:
            write(staging)
            files = {
                path.relative_to(staging).as_posix(): sum_of_file(path) for path in staging.rglob("*") if path.is_file()
            }
            write_manifest(staging, Manifest(files, {"entry": directory.name}))
            commit_directory(staging, directory, replace=False)
        except OSError:
            if not directory.exists():  # otherwise another run was faster, with the same content
                raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except UserError:
        raise
    except Exception as error:  # each library that writes has errors of its own
        if system_word(error) is None:
            raise
        raise _cache_error(directory.parent, error) from error


def find_damage(directory: Path) -> str | None:
    """The damage to a directory of the cache; None if it is intact."""
    if not directory.is_dir():
        return "it is a file" if directory.is_file() else "there is none"
    try:
        manifest = read_manifest(directory)
    except CheckpointError:
        return f"its {MANIFEST} is missing or damaged"
    if manifest.about.get("entry") != directory.name:
        return f"it is {manifest.about.get('entry')} under another name"
    present = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    if more := present - {MANIFEST, *manifest.files}:
        return f"{min(more)} does not belong there"
    for name, expected in manifest.files.items():
        reason = reason_against(directory / name, expected, reads=expected.bytes <= _MAX_SUMMED_BYTES)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _remove(directory: Path, damage: str, info: Callable[[str], None]) -> None:
    """Remove a damaged directory, and the remains of killed processes. Call it while holding its lock."""
    if directory.exists():
        info(f"warning: {directory} is damaged ({damage}): it is rebuilt")
    for path in (directory, *directory.parent.glob(f"{directory.name}.*")):
        try:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{path}: is damaged and cannot be removed: {system_word(error)}") from error


def _cache_error(cache: Path, error: BaseException) -> UserError:
    return UserError(f"run.cache_directory: {cache} cannot be used: {system_word(error)}")
