"""Atomic files and directories: written under a temporary name, and renamed at the end.

The other name is on the file system of the target, since only there a rename is atomic. `durable` waits until contents
and names are on the disk, so that the promise holds also if the machine goes down.
"""

import glob
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_TEMPORARY = ".tmp"


@contextmanager
def replacing_file(path: Path, *, durable: bool, mode: int = 0o666) -> Iterator[TextIO]:
    """A text file to write, which takes the place of `path` when the block ends without an error.

    Readers see the old content or the new one. If several processes do it at once, the last one wins. After an error,
    `path` is as it was and nothing else is left. The file gets those permissions of `mode` that the umask leaves.
    """
    temporary = _unused_path(path, _TEMPORARY)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_temporaries(path: Path) -> None:
    """Remove the files of processes that were killed in `replacing_file(path)`; call it while no process is in it."""
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.*{_TEMPORARY}"):
        leftover.unlink(missing_ok=True)


def staging_path(target: Path) -> Path:
    """The directory that is renamed to `target` when it is complete, if one process at a time writes it."""
    return target.parent / f".{target.name}-unfinished"


def make_staging_directory(target: Path, *, inside: bool = False, shared: bool = False) -> Path:
    """Make an empty directory on the target's file system, to be renamed to `target`, and the directories above it.

    It is `staging_path(target)`, emptied of what an interrupted process left. The caller removes it after an error.

    Args:
        target: the directory to be.
        inside: put it into the target, if that exists.
        shared: several processes may write the target at once, so give each a directory of its own.

    Raises:
        FileExistsError: the target is a file.
    """
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; give the name of a directory to save in.")
    if shared:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = _unused_path(target)
        staging.mkdir()
        return staging
    staging = staging_path(target)
    if inside and target.is_dir():
        staging = target / staging.name
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def commit_directory(staging: Path, target: Path, *, replace: bool = True, durable: bool = True) -> None:
    """Rename a staging directory to `target`.

    Raises:
        OSError: the target exists and is not empty, and is not to be replaced.
    """
    _follow_umask(staging)
    if durable:
        _sync_directory(staging)
    old = target.parent / f".{target.name}-older"
    if replace:
        shutil.rmtree(old, ignore_errors=True)
        if target.is_dir():
            target.rename(old)
    staging.rename(target)
    if durable:
        _sync(target.parent)
    if replace:
        shutil.rmtree(old, ignore_errors=True)


def commit_files(staging: Path, target: Path, entry_points: set[str], obsolete: re.Pattern[str]) -> None:
    """Move the files of a staging directory into `target`, which may have other files; durable.

    Args:
        staging: has files only.
        target: is renamed as a whole from `staging` if it does not exist.
        entry_points: the names of the files with which reading begins. Old ones are deleted first and new ones moved
            last, so that at no time they lead to a mixture of old and new files.
        obsolete: matches the names of files in the target to delete, unless they are replaced.
    """
    if not target.is_dir():
        commit_directory(staging, target)
        return
    _follow_umask(staging)
    _sync_directory(staging)
    names = sorted((path.name for path in staging.iterdir()), key=lambda name: name in entry_points)
    for path in list(target.iterdir()):
        if path.name in entry_points or (obsolete.fullmatch(path.name) and path.name not in names):
            path.unlink()
    for name in names:
        (staging / name).replace(target / name)
    _sync(target)


def _unused_path(path: Path, suffix: str = "") -> Path:
    """A path beside another one that no other process chooses."""
    return path.with_name(f"{path.name}.{secrets.token_hex(6)}{suffix}")


def _follow_umask(directory: Path) -> None:
    """Give the files in a directory the permissions of a new file. Some libraries write theirs for the user alone."""
    probe = directory / ".permissions"
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    probe.unlink()
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def _sync_directory(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        _sync(path)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
