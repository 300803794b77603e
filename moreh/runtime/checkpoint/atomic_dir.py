"""Directories that are complete or absent: written under another name, flushed to the disk, and renamed at the end."""

import os
import re
import shutil
from pathlib import Path


def unfinished_directory(target: Path, *, inside: bool = False) -> Path:
    """Make an empty directory on the target's file system for files that are not complete yet; older remains are deleted.

    It is beside the target, or with `inside` in it where it exists.

    Raises:
        FileExistsError: the target is a file.
    """
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; give the name of a directory to save in.")
    unfinished = unfinished_name(target)
    if inside and target.is_dir():
        unfinished = target / unfinished.name
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    return unfinished


def unfinished_name(target: Path) -> Path:
    """Where what will be `target` is written."""
    return target.parent / f".{target.name}-unfinished"


def publish_directory(unfinished: Path, target: Path) -> None:
    """Give a directory its name, in the place of an older one."""
    _flush_all(unfinished)
    older = target.parent / f".{target.name}-older"
    shutil.rmtree(older, ignore_errors=True)
    if target.is_dir():
        target.rename(older)
    unfinished.rename(target)
    _flush(target.parent)
    shutil.rmtree(older, ignore_errors=True)


def publish_files(unfinished: Path, target: Path, first_read: set[str], replaced: re.Pattern[str]) -> None:
    """Move files into a directory that may have others, which stay unless they match `replaced`.

    `first_read` are the names with which reading begins: older ones go first and new ones come last, so that at no time they
    lead to a mixture.
    """
    if not target.is_dir():
        publish_directory(unfinished, target)
        return
    _flush_all(unfinished)
    names = sorted((path.name for path in unfinished.iterdir()), key=lambda name: name in first_read)
    for path in list(target.iterdir()):
        if path.name in first_read or (replaced.fullmatch(path.name) and path.name not in names):
            path.unlink()
    for name in names:
        (unfinished / name).replace(target / name)
    _flush(target)


def _flush_all(directory: Path) -> None:
    for path in (*directory.iterdir(), directory):
        _flush(path)


def _flush(path: Path) -> None:
    """Have a file's contents, or a directory's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
