"""Starts the worker processes that measure this machine together.

What each of them measures is in microbenchmarks.py.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from moreh import bootstrap
from moreh.errors import PlanError

# The file, in the directory of a measurement, into which rank 0 writes the figures.
FIGURES_FILE = "figures.json"
TIMEOUT_S = 180.0
# Names of directories begin with this and the id of the process that measures.
_PREFIX = "moreh-measure-"


def run_workers(workers: int, threads: int) -> dict[str, Any]:
    """Measure in `workers` processes of `threads` CPU threads each. Returns the figures of `Worker.measure`.

    Raises:
        PlanError: one of the processes failed, or they took too long.
    """
    _remove_leftovers()
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-") as name:
        directory = Path(name)
        # Not multiprocessing, which would run a script without a main guard again. The processes end with this one.
        command = [sys.executable, "-I", "-S", bootstrap.__file__, str(os.getpid()), "", "console"]
        command += [sys.executable, "-m", "moreh.planner.hardware.microbenchmarks", f"--directory={directory}"]
        command += [f"--workers={workers}", f"--threads={threads}"]
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH"))))
        # Threads that sleep while they wait are disturbed least by other programs.
        env = {"GOMP_SPINCOUNT": "1000"} | os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
        env["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(workers):
                rank_command = [*command, f"--rank={rank}"]
                with (directory / f"{rank}.log").open("wb") as log:
                    processes.append(subprocess.Popen(rank_command, env=env, cwd=directory, stdout=log, stderr=log))
            _wait(processes, directory)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return json.loads((directory / FIGURES_FILE).read_text(encoding="utf-8"))


def _remove_leftovers() -> None:
    """Remove the directories of processes that were killed while they measured."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _wait(processes: list[subprocess.Popen[bytes]], directory: Path) -> None:
    """Wait until all processes have ended well.

    Raises:
        PlanError: a process failed, with the last line that it wrote, or they took longer than TIMEOUT_S.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while (codes := [process.poll() for process in processes]) != [0] * len(processes):
        for rank, code in enumerate(codes):
            if code:
                lines = (directory / f"{rank}.log").read_text(encoding="utf-8", errors="replace").splitlines()
                last = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
                raise PlanError(f"this machine could not be measured with {len(processes)} workers: {last.strip()}")
        if time.monotonic() > deadline:
            raise PlanError(f"measuring this machine with {len(processes)} workers took more than {TIMEOUT_S:.0f} s")
        time.sleep(0.02)
