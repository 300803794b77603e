"""The error that ends a worker: recorded in a file for the process that started it, and shown once.

When a worker dies, the others fail within a moment because they lose the connection to it. Such an error says nothing
about its cause, so it is recorded but kept off the console.
"""

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

# The variable that tells a worker of torch.distributed.elastic where to write its error.
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
MAX_MESSAGE_CHARS = 1000
# What gloo, NCCL and torch's stores say when the other side is gone. All of these are RuntimeErrors.
_LOST_CONNECTION = re.compile(
    r"connection (was )?(likely )?(closed|reset|refused)|broken pipe|connectFullMesh failed|pair closure"
    r"|timed out waiting|socket timeout|remote process (has )?exited|ncclRemoteError|communicator was aborted"
    r"|failed to (recv|connect)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class WorkerErrorRecord:
    """The exception that ended a worker."""

    message: str
    """The exception's class and the first line of its text, as in "ValueError: bad row 17"."""
    time: float
    """The time at which the exception ended the worker, in seconds since the epoch."""
    lost_connection: bool
    """True if the exception says only that another worker could not be reached any more."""

    @property
    def type_name(self) -> str:
        """The exception's class."""
        return self.message.split(":")[0]


def record_errors(*, lost_connection_log: Path | None) -> None:
    """From now on, write the exception that ends this process to its error file, and show it as before.

    Args:
        lost_connection_log: where the traceback of a lost connection goes instead of the console. None: to the console.
    """
    show = sys.excepthook

    def record_and_show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        lost_connection = is_lost_connection(error)
        if issubclass(kind, Exception):
            _write_record(error, lost_connection)
        if lost_connection and lost_connection_log is not None:
            text = "".join(traceback.format_exception(error))
            lost_connection_log.write_text(text, encoding="utf-8", errors="replace")
        else:
            show(kind, error, trace)

    sys.excepthook = record_and_show


def is_lost_connection(error: BaseException) -> bool:
    """True if an exception, or one that led to it, says that another worker could not be reached any more."""
    return any(
        isinstance(e, (dist.DistNetworkError, dist.DistStoreError))
        or (isinstance(e, RuntimeError) and _LOST_CONNECTION.search(str(e)) is not None)
        for e in _with_causes(error)
    )


def read_error_record(path: Path) -> WorkerErrorRecord | None:
    """The error that a worker left; None if it ended without one."""
    try:
        message = json.loads(path.read_text(encoding="utf-8"))["message"]
        extra = message["extraInfo"]
        return WorkerErrorRecord(message["message"], float(extra["time"]), bool(extra["lost_connection"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # cut off by a signal, or written by the script for its own purposes


def _write_record(error: BaseException, lost_connection: bool) -> None:
    """Write the record in the format of torch.distributed.elastic, with two more entries."""
    path = os.environ.get(ERROR_FILE)
    if not path:
        return
    now = time.time()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    extra = {
        "py_callstack": "".join(traceback.format_exception(error)),
        "timestamp": str(int(now)),
        "time": now,
        "lost_connection": lost_connection,
    }
    content = {"message": {"message": message[:MAX_MESSAGE_CHARS], "extraInfo": extra}}
    try:
        Path(path).write_text(json.dumps(content), encoding="utf-8")
    except OSError:
        return  # a full disk: perhaps the log has the traceback


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and all that led to it."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            yield current
            waiting += [current.__cause__, current.__context__]
