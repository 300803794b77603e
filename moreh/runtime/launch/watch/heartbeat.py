"""The heartbeat of a worker: a small file with its step and phase, which the launcher reads.

Each span of `moreh.trace` and each step of an optimizer writes a heartbeat, so a worker that computes, plans, loads or
saves writes some. The file is mapped into memory: a heartbeat takes about a microsecond, and a worker that hangs or
dies leaves its last one. On a signal of the launcher, the worker writes its stack to another file, even while it waits
in a collective.
"""

import atexit
import faulthandler
import mmap
import signal
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moreh import trace

# A signal that nothing else uses; there is none where the system has no real-time signals.
STACK_SIGNAL: int | None = signal.SIGRTMIN + 14 if hasattr(signal, "SIGRTMIN") else None
# Phases that may take many times as long as a step.
PATIENT_SPANS = frozenset(
    {
        "choose_plan",
        "shard_model",
        "save_training",
        "load_training",
        "save_pretrained",
        "load_state_dict",
        "save_model",
        "flush_checkpoint",
        "generate_sample",
    }
)
# Number of heartbeats, time of the last one, step, whether it is in a phase that takes long; then two strings.
_HEAD = struct.Struct("<QdqB")
_WHERE_BYTES, _ROWS_BYTES = 200, 2000
_SIZE = _HEAD.size + _WHERE_BYTES + _ROWS_BYTES
_NO_STEP = -1


@dataclass(frozen=True)
class Heartbeat:
    """The last heartbeat of a worker."""

    count: int = 0
    """The number of heartbeats until now; 0 for a worker that has not begun."""
    time: float = 0.0
    """The time of the heartbeat, in seconds since the epoch."""
    step: int | None = None
    """The step of the training; None before the first."""
    is_patient: bool = True
    """True if the worker is in a phase that may take many times as long as a step."""
    where: str = ""
    """The spans that it is in, the outermost first."""
    rows: str = ""
    """The rows of the step, as the script names them."""

    @property
    def place(self) -> str:
        """The step and its phase, for a message."""
        step = "before the first step" if self.step is None else f"step {self.step}"
        return f"{step}, in {self.where}" if self.where else step


class _HeartbeatWriter:
    """Writes the heartbeat of this process."""

    def __init__(self, path: Path) -> None:
        with path.open("w+b") as file:
            file.truncate(_SIZE)
            self._map = mmap.mmap(file.fileno(), _SIZE)
        self._thread = threading.get_ident()
        self._spans: list[str] = []
        self._count, self._step, self._is_patient = 0, _NO_STEP, True
        self._script_counts = False
        self.write()

    def enter(self, name: str) -> None:
        """A span begins."""
        if threading.get_ident() == self._thread:  # a thread that writes a checkpoint says nothing about the training
            self._spans.append(name)
            self.write()

    def leave(self) -> None:
        """The innermost span ends."""
        if threading.get_ident() == self._thread and self._spans:
            self._spans.pop()
            self.write()

    def begin_step(self, step: int, rows: str) -> None:
        """A step of the training begins. The first one plans, loads and compiles."""
        self._is_patient = self._step == _NO_STEP
        self._step, self._script_counts = step, True
        _write_text(self._map, _HEAD.size + _WHERE_BYTES, rows, _ROWS_BYTES)
        self.write()

    def end_optimizer_step(self) -> None:
        """An optimizer has updated the weights. It is counted if the script does not say where its steps begin."""
        self._is_patient = False
        if not self._script_counts:
            self._step = max(self._step, 0) + 1
        self.write()

    def end(self) -> None:
        """The script has ended, and Python shuts down."""
        self._is_patient = True
        self.write()

    def write(self) -> None:
        """Write where this process is."""
        self._count += 1
        is_patient = self._is_patient or not PATIENT_SPANS.isdisjoint(self._spans)
        _write_text(self._map, _HEAD.size, ", ".join(self._spans), _WHERE_BYTES)
        _HEAD.pack_into(self._map, 0, self._count, time.time(), self._step, is_patient)


_writer: _HeartbeatWriter | None = None


def start_heartbeat(path: Path, stack_path: Path) -> None:
    """Write the heartbeat of this process from now on, and its stack at the launcher's signal or when it crashes."""
    global _writer
    from torch.optim.optimizer import register_optimizer_step_post_hook

    stack_file = stack_path.open("a", encoding="utf-8")  # stays open: faulthandler keeps its descriptor
    faulthandler.enable(stack_file)
    if STACK_SIGNAL is not None:
        faulthandler.register(STACK_SIGNAL, stack_file)
    writer = _writer = _HeartbeatWriter(path)
    trace.watch_spans(writer.enter, writer.leave)

    def after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
        writer.end_optimizer_step()

    register_optimizer_step_post_hook(after_step)
    atexit.register(writer.end)


def begin_step(step: int, rows: Callable[[], str]) -> None:
    """Tell the launcher, if one watches this process, that a step begins, and the rows that it trains on."""
    if _writer is not None:
        _writer.begin_step(step, rows())


def read_heartbeat(path: Path) -> Heartbeat:
    """The last heartbeat that a worker has written; one with a count of 0 if there is none."""
    try:
        content = path.read_bytes()
    except OSError:
        return Heartbeat()
    if len(content) < _SIZE:
        return Heartbeat()
    count, moment, step, is_patient = _HEAD.unpack_from(content)
    where = _read_text(content[_HEAD.size : _HEAD.size + _WHERE_BYTES])
    rows = _read_text(content[_HEAD.size + _WHERE_BYTES :])
    return Heartbeat(count, moment, None if step == _NO_STEP else step, bool(is_patient), where, rows)


def _write_text(target: mmap.mmap, offset: int, text: str, size: int) -> None:
    content = text.encode(errors="replace")[: size - 1]
    target[offset : offset + len(content) + 1] = content + b"\0"


def _read_text(content: bytes) -> str:
    return content.partition(b"\0")[0].decode(errors="ignore")
