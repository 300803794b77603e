"""The files of the registry and the jobs: their location, and atomic reads and writes.

A crash, or many writers at once, never leaves a file half written.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from moreh.atomic_io import replacing_file
from moreh.errors import RegistryError

LOCK_TIMEOUT_SECONDS = 30.0


def state_directory() -> Path:
    """The directory of the registry and the job files.

    `MOREH_STATE_DIR` if it is set, else `moreh/<host name>` in `XDG_STATE_HOME`, by default `~/.local/state`. The host
    name is part of the path because machines that share a home directory do not share process ids.

    Raises:
        RegistryError: there is no home directory.
    """
    directory = os.environ.get("MOREH_STATE_DIR")
    if directory:
        return _absolute(directory)
    try:
        base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    except RuntimeError:
        raise RegistryError("there is no home directory: set MOREH_STATE_DIR to a writable directory") from None
    return _absolute(base) / "moreh" / socket.gethostname()


@cache
def _absolute(directory: str) -> Path:
    """The absolute path at the first call, even if the program changes its working directory later."""
    return Path(directory).absolute()


@contextmanager
def writer_lock() -> Iterator[None]:
    """Hold the lock that every writer of the registry takes. The operating system releases it when its holder dies.

    Raises:
        RegistryError: the directory cannot be written, or another process held the lock for LOCK_TIMEOUT_SECONDS.
    """
    from filelock import FileLock, Timeout  # a third of the tools' start-up time, and readers do not need it

    path = state_directory() / "registry.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path, timeout=LOCK_TIMEOUT_SECONDS):
            yield
    except Timeout:
        raise RegistryError(
            f"{path} has been locked by another process for {LOCK_TIMEOUT_SECONDS:.0f} s: "
            "end that process and try again"
        ) from None
    except OSError as error:
        raise _unusable(path.parent, error) from None


def read_json(path: Path) -> Any | None:
    """The content of a JSON file, or None if there is no such file.

    Raises:
        RegistryError: the file cannot be read, or is not JSON because somebody edited it (replacement is atomic).
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(path, error) from None
    except (ValueError, RecursionError) as error:
        raise RegistryError(f"{path} is damaged ({error}): delete it to start with one new accelerator") from None


def replace_json(path: Path, content: Any, *, durable: bool) -> None:
    """Write a JSON file so that a reader sees the old content or the new one, never a part of it.

    With `durable`, the new content is on the disk before it replaces the old content. So a reader sees one of the two
    even if the machine goes down.

    Raises:
        RegistryError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path, durable=durable, mode=0o600) as file:  # it has the tokens
            json.dump(content, file, indent=1)
    except OSError as error:
        raise _unusable(path, error) from None


def _unusable(path: Path, error: OSError) -> RegistryError:
    return RegistryError(f"{path} cannot be used: {error.strerror}. Set MOREH_STATE_DIR to a writable directory")
