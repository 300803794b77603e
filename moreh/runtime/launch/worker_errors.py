"""The error that ends a worker: written to a file for the process that started it, and shown once.

When a worker dies, the others fail within a moment because they lose the connection to it. Such an error says nothing
about its cause, so it is written down but kept off the console.
"""

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

# The variable that tells a worker of torch.distributed.elastic where to write its error.
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
LONGEST_MESSAGE = 1000
# How gloo, NCCL and torch's stores put it when the other side is gone. All of these are RuntimeErrors.
_LOST_CONNECTION = re.compile(
    r"connection (was )?(likely )?(closed|reset|refused)|broken pipe|connectFullMesh failed|pair closure|timed out waiting"
    r"|socket timeout|remote process (has )?exited|ncclRemoteError|communicator was aborted|failed to (recv|connect)",
    re.IGNORECASE,
)

Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


@dataclass(frozen=True)
class WorkerError:
    """The exception that ended a worker, in one line; `time` in seconds since the epoch."""

    message: str
    time: float
    lost_connection: bool

    @property
    def type_name(self) -> str:
        """The exception's class."""
        return self.message.split(":")[0]


def keep_errors(*, held_back_in: Path | None) -> None:
    """Write the exception that ends this process to its error file, from now on.

    Args:
        held_back_in: where to write a lost connection instead of the console; None: it is shown like other errors.
    """
    show = sys.excepthook

    def keep_and_show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        lost_connection = is_lost_connection(error)
        if issubclass(kind, Exception):
            _write(error, lost_connection)
        if lost_connection and held_back_in is not None:
            held_back_in.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="replace")
        else:
            show(kind, error, trace)

    sys.excepthook = keep_and_show


def is_lost_connection(error: BaseException) -> bool:
    """Whether an exception, or one that it came from, is that another worker could not be reached any more."""
    return any(
        isinstance(e, (dist.DistNetworkError, dist.DistStoreError))
        or (isinstance(e, RuntimeError) and _LOST_CONNECTION.search(str(e)) is not None)
        for e in _chain(error)
    )


def read_error(path: Path) -> WorkerError | None:
    """The error that a worker left; None if it ended without one."""
    try:
        message = json.loads(path.read_text(encoding="utf-8"))["message"]
        extra = message["extraInfo"]
        return WorkerError(message["message"], float(extra["time"]), bool(extra["lost_connection"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # cut off by a signal, or a script's own use of the file


def _write(error: BaseException, lost_connection: bool) -> None:
    """In the format of torch.distributed.elastic, with two entries more."""
    path = os.environ.get(ERROR_FILE)
    if not path:
        return
    now = time.time()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    extra = {
        "py_callstack": "".join(traceback.format_exception(error)),
        "timestamp": str(int(now)),
        "time": now,
        "lost_connection": lost_connection,
    }
    content = {"message": {"message": text[:LONGEST_MESSAGE], "extraInfo": extra}}
    try:
        Path(path).write_text(json.dumps(content), encoding="utf-8")
    except OSError:
        return  # a full disk: the log has the traceback, perhaps


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            yield current
            waiting += [current.__cause__, current.__context__]
