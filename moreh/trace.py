"""Spans for the phases and the collectives of a step: profiler ranges, and with `MOREH_TRACE=1` log lines as well.

    with span("all_reduce_loss", tensor.nbytes):
        dist.all_reduce(tensor, group=group)

A `torch.profiler` trace shows the span as `moreh::all_reduce_loss`. With `MOREH_TRACE=1` each rank logs

    [info] trace rank 1:   all_reduce_loss 0.412 ms, 65,536 bytes

when the span ends, indented by the number of spans around it. A phase's line therefore follows the lines of its parts.
The time is host time: on a GPU the span ends when the work is enqueued, and the profiler's trace shows when it ran.

Nothing here imports torch. Without torch there is no profiler.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

from moreh.errors import OptionError
from moreh.log import logger

VARIABLE = "MOREH_TRACE"
PREFIX = "moreh::"
# A child of the log's logger: a filter that silences the info lines of ranks other than 0 does not apply to it.
_logger = logger.getChild("trace")
_logs_spans = False
# The functions that are called as a span begins and ends.
_watcher: tuple[Callable[[str], None], Callable[[], None]] | None = None
_nesting = threading.local()


def span(name: str, bytes: int | None = None) -> AbstractContextManager[Any]:
    """A context that records one phase or one collective of a step.

    `bytes` is the size of the tensors that a collective communicates, in bytes; None for a phase.
    """
    recorded = _profiler_span(name)
    if _logs_spans:
        recorded = _LoggedSpan(name, bytes, recorded)
    return recorded if _watcher is None else _WatchedSpan(name, recorded, *_watcher)


def watch_spans(enter: Callable[[str], None], leave: Callable[[], None]) -> None:
    """From now on, call `enter` with the name of each span as it begins, and `leave` as it ends."""
    global _watcher
    _watcher = enter, leave


def logs_spans() -> bool:
    """True if spans are logged, as MOREH_TRACE=1 asks for."""
    return _logs_spans


def read_variable() -> None:
    """Log spans from now on if the environment variable MOREH_TRACE is 1. Called by the hook.

    Raises:
        OptionError: the variable is set to something other than 0 and 1.
    """
    value = os.environ.get(VARIABLE, "").strip()
    if value not in ("", "0", "1"):
        raise OptionError(
            f"{VARIABLE}={value!r}: expected 1, which logs each phase of a step, or 0, which is the default"
        )
    global _logs_spans
    _logs_spans = value == "1"


def _profiler_span(name: str) -> AbstractContextManager[Any]:
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return nullcontext()
    # The range of torch.profiler.record_function in a twentieth of its time: half a microsecond while no profiler runs.
    recorded: AbstractContextManager[Any] = torch._C._profiler._RecordFunctionFast(PREFIX + name)
    return recorded


class _WatchedSpan:
    """A span that reports its begin and end."""

    __slots__ = ("_enter", "_leave", "_name", "_recorded")

    def __init__(
        self,
        name: str,
        recorded: AbstractContextManager[Any],
        enter: Callable[[str], None],
        leave: Callable[[], None],
    ) -> None:
        self._name, self._recorded, self._enter, self._leave = name, recorded, enter, leave

    def __enter__(self) -> None:
        self._enter(self._name)
        self._recorded.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._recorded.__exit__(kind, error, traceback)
        self._leave()


class _LoggedSpan:
    """A span that logs its time."""

    __slots__ = ("_bytes", "_name", "_recorded", "_start")

    def __init__(self, name: str, bytes: int | None, recorded: AbstractContextManager[Any]) -> None:
        self._name = name
        self._bytes = bytes
        self._recorded = recorded
        self._start = 0.0

    def __enter__(self) -> None:
        _nesting.depth = getattr(_nesting, "depth", 0) + 1
        self._recorded.__enter__()
        self._start = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        milliseconds = (time.perf_counter() - self._start) * 1000
        self._recorded.__exit__(kind, error, traceback)
        _nesting.depth -= 1
        moved = "" if self._bytes is None else f", {self._bytes:,} bytes"
        failed = "" if kind is None else f", ended by {kind.__name__}"
        indent = "  " * _nesting.depth
        _logger.info("trace rank %d: %s%s %.3f ms%s%s", _rank(), indent, self._name, milliseconds, moved, failed)


def _rank() -> int:
    """This process's rank; 0 where it computes alone."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 0
    rank: int = distributed.get_rank()
    return rank
