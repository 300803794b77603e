"""Files that all workers of a script write: the worker that comes first writes them, and the others wait for it.

If each worker wrote the file, a slow one would empty it while a fast one reads what it has just written.
"""

import contextlib
import io
import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import DistError

from moreh.runtime.launch.shared_calls import DONE, SharedCalls

# How long a worker that has closed its file waits for the one that writes it.
PATIENCE = timedelta(seconds=5)


def is_written_whole(file: Any, mode: Any, kwargs: dict[str, Any]) -> bool:
    """True if `open(file, mode, **kwargs)` empties or creates an ordinary file."""
    if not isinstance(mode, str) or "w" not in mode or not isinstance(file, str | os.PathLike):
        return False
    if kwargs.get("opener") is not None:
        return False
    try:
        return stat.S_ISREG(Path(file).stat().st_mode)
    except OSError:
        return True


def open_once(calls: SharedCalls, rank: int, original: Any, file: Any, mode: str, *args: Any, **kwargs: Any) -> Any:
    """The file on worker 0 or on the worker that comes first; on the others, while that is open, a discarded file.

    Worker 0 writes in any case, since a script may write some lines there alone. A worker that comes once the file is
    closed writes its own, which takes the place of that one once it is complete: workers may write in turns.

    Raises:
        OSError: the file cannot be opened.
    """
    path = os.path.abspath(file)  # noqa: PTH100  the name, without asking the file system
    name = f"write/{path}/{calls.count(f'write/{path}')}"
    opened: list[Any] = []
    try:
        outcome = calls.first(
            f"write/{path}", lambda: opened.append(_open_unshared(original, rank, file, mode, *args, **kwargs))
        )
    except DistError:  # worker 0 has ended, which has the store if no launcher has it
        return opened[0] if opened else original(file, mode, *args, **kwargs)
    if outcome is None:
        _call_after_close(opened[0], lambda: _end_of_first(calls, rank, name))
        return opened[0]
    if rank == 0 and calls.number(f"{name}/taken-over") == 1:
        opened.append(_open_unshared(original, rank, file, mode, *args, **kwargs))
        _call_after_close(opened[0], lambda: calls.announce(f"{name}/closed-by-0"))
        return opened[0]
    if outcome.isdecimal():
        raise OSError(int(outcome), os.strerror(int(outcome)), os.fspath(file))
    if outcome != DONE:
        return original(file, mode, *args, **kwargs)  # the arguments are wrong
    if rank == 0 or calls.has(f"{name}/closed"):
        unfinished, target = _unfinished(rank, file)
        private = original(unfinished, mode, *args, **kwargs)
        _call_after_close(private, lambda: os.replace(unfinished, target))  # noqa: PTH105
    else:
        private = (
            _temporary(original, file, mode, *args, **kwargs) if "+" in mode else _discarding(mode, *args, **kwargs)
        )
        _call_after_close(private, lambda: calls.wait_for(f"{name}/closed", PATIENCE))
    _set_name(private, file)
    return private


class _DiscardedFile(io.FileIO):
    """A file of which only the position is kept."""

    def __init__(self) -> None:
        super().__init__(os.devnull, "w")
        self._position = self._end = 0

    def write(self, content: Any) -> int:
        number = memoryview(content).nbytes
        self._position += number
        self._end = max(self._end, self._position)
        return number

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._end)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def truncate(self, size: int | None = None) -> int:
        self._end = self._position if size is None else size
        return self._end


def _discarding(
    mode: str,
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Any = None,
) -> Any:
    """`open(path, mode, ...)` for writing, with a file that takes no space."""
    raw = _DiscardedFile()
    if "b" in mode:
        return io.BufferedWriter(raw) if buffering else raw
    text: Any = io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, newline, buffering == 1)
    text.mode = mode
    return text


def _temporary(original: Any, file: Any, mode: str, *args: Any, **kwargs: Any) -> Any:
    """A file without a name, for a script that reads what it writes."""
    descriptor, name = tempfile.mkstemp(dir=Path(os.path.realpath(file)).parent)
    os.unlink(name)  # noqa: PTH108
    return original(descriptor, mode, *args, **kwargs)


def _open_unshared(original: Any, rank: int, file: Any, mode: str, *args: Any, **kwargs: Any) -> Any:
    """An empty file in the place of the present one, which is complete for those that are reading it."""
    unfinished, target = _unfinished(rank, file)
    if not target.exists() or not os.access(target, os.W_OK) or not os.access(target.parent, os.W_OK):
        return original(file, mode, *args, **kwargs)
    opened = original(unfinished, mode, *args, **kwargs)
    shutil.copymode(target, unfinished)
    os.replace(unfinished, target)  # noqa: PTH105
    _set_name(opened, file)
    return opened


def _unfinished(rank: int, file: Any) -> tuple[Path, Path]:
    """The name of a file until it takes its place, and that place."""
    target = Path(os.path.realpath(file))
    return target.with_name(f".{target.name}-unfinished-{rank}"), target


def _set_name(opened: Any, file: Any) -> None:
    """Let an open file say that it is `file`."""
    raw = getattr(getattr(opened, "buffer", opened), "raw", opened)
    raw.name = os.fspath(file)


def _end_of_first(calls: SharedCalls, rank: int, name: str) -> None:
    """Tell that the first worker has closed its file, after worker 0 if that writes it as well."""
    if not calls.are_here():
        return
    with contextlib.suppress(DistError):  # a worker has not come, or worker 0 has ended
        if rank != 0 and calls.number(f"{name}/taken-over") > 1:
            calls.wait_for(f"{name}/closed-by-0", PATIENCE)
        calls.announce(f"{name}/closed")


def _call_after_close(file: Any, function: Callable[[], None]) -> None:
    """Call a function once a file is closed, by `close()`, at the end of a `with` or when nothing refers to it."""
    reference = weakref.ref(file)  # a strong one would keep the file open

    def close() -> None:
        target = reference()
        if target is not None and not target.closed:
            try:
                type(target).close(target)
            finally:
                function()

    file.close = close
