"""A part in a process of its own, started again without the case that ended it.

On a GPU the process is a new Python. In the dry mode it is a copy of this one (fork), which saves the seconds that
torch and transformers take to import.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

Record = dict[str, Any]
_POLL_S = 0.05
DRY_BUDGET_FACTOR = 10


@dataclass(frozen=True)
class Part:
    """A part of the check."""

    name: str
    """The part's module in `gpu_check.parts`, unless `module` names another one."""
    title: str
    """The part's name in the report."""
    cases: tuple[str, ...]
    """The cases, in the order of running."""
    budget_s: float
    """Seconds for all cases; those that are left then have failed."""
    module: str = ""
    """The module, where several parts are of one."""
    own_processes: bool = False
    """True if each case is a process of its own."""
    environment: tuple[tuple[str, str], ...] = ()
    """Variables of its processes."""
    alone: bool = False
    """True if nothing else may compute meanwhile, since it measures speed or needs results of the parts before it."""


class Isolation:
    """Starts the processes of parts, and waits for them."""

    def __init__(self, scratch: Path, environment: dict[str, str], *, fork: bool) -> None:
        self._scratch = scratch
        self._environment = environment
        self._fork = fork
        self._processes = 0

    def run(self, part: Part, deadline: float) -> Iterator[Record]:
        """The records of a part, each as soon as it is there; `deadline` is a time of `time.monotonic`."""
        # The dry mode may share its cores with anything.
        budget_s = part.budget_s * (DRY_BUDGET_FACTOR if self._fork else 1)
        deadline = min(deadline, time.monotonic() + budget_s)
        remaining = list(part.cases)
        while remaining:
            if time.monotonic() >= deadline:
                yield from (_failed(case, "no time was left") for case in remaining)
                return
            cases = remaining[:1] if part.own_processes else list(remaining)
            reason = ""
            started = None
            for record in self._run_process(part, cases, deadline):
                if record["status"] == "started":
                    started = record["case"]
                elif record["status"] == "ended":
                    reason = record["reason"]
                else:
                    started = None
                    remaining.remove(record["case"])
                    yield record
            if started is None and cases[0] in remaining:
                started = cases[0]  # it ended before its first case
            if started is not None:
                remaining.remove(started)
                yield _failed(started, reason)

    def _run_process(self, part: Part, cases: list[str], deadline: float) -> Iterator[Record]:
        """The records of one process, and at last one with the status "ended"."""
        self._processes += 1
        name = f"{part.name}-{self._processes}"
        records, log = self._scratch / f"{name}.jsonl", self._scratch / f"{name}.log"
        records.touch()
        # Parts that run at the same time must not wait for each other; and what one has measured, it need not again.
        state = self._scratch / f"state-{part.name}"
        environment = {**self._environment, "MOREH_STATE_DIR": str(state), **dict(part.environment)}
        arguments = [part.module or part.name, str(records), *cases]
        processes: _Processes = (_Forked if self._fork else _Spawned)(arguments, environment, log)
        read, exit_code = 0, None
        while True:
            ended = (exit_code := processes.poll()) is not None
            is_late = time.monotonic() > deadline
            if is_late and not ended:
                processes.kill()
            lines = records.read_text(encoding="utf-8").splitlines()
            for line in lines[read:]:
                yield json.loads(line)
            read = len(lines)
            if ended:
                break
            time.sleep(_POLL_S)
        why = "its time was over" if is_late else f"its process ended with code {exit_code}"
        yield {"case": "", "status": "ended", "reason": f"{why}: {_last_line(log)}"}


class _Processes(Protocol):
    """The processes that run the cases of a part: one, or one for each worker."""

    def poll(self) -> int | None:
        """The exit code, the first other than 0 of several; None while one of them runs."""

    def kill(self) -> None:
        """End the processes and their children."""


class _Spawned:
    """A new Python."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        command = [sys.executable, "-m", "gpu_check.child", *arguments]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        _kill(self._process.pid)


class _Forked:
    """Copies of this process: one, or one for each worker, as torchrun starts them."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        workers = int(environment["MOREH_WORKERS"])
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        world = {"WORLD_SIZE": str(workers), "LOCAL_WORLD_SIZE": str(workers)}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self._running: dict[int, int | None] = {}
        for rank in range(workers):
            own = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} if workers > 1 else {}
            pid = os.fork()
            if pid == 0:
                _become_child(arguments, environment | own, log)
            self._running[pid] = None

    def poll(self) -> int | None:
        for pid, code in self._running.items():
            if code is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                self._running[pid] = os.waitstatus_to_exitcode(status) if ended else None
        codes = [code for code in self._running.values() if code is not None]
        return next(filter(None, codes), 0) if len(codes) == len(self._running) else None

    def kill(self) -> None:
        for pid, code in self._running.items():
            if code is None:
                _kill(pid)


def _become_child(arguments: list[str], environment: dict[str, str], log: Path) -> NoReturn:
    code = 1
    try:
        os.setsid()
        with log.open("ab") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.environ.update(environment)
        from gpu_check.child import main

        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _last_line(log: Path) -> str:
    """The last line that a process wrote that says something."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it wrote nothing"


def _failed(case: str, reason: str) -> Record:
    return {"case": case, "status": "failed", "reason": reason, "seconds": None}
