"""Faults of a run on several workers: each is done to it once, at a moment that the caller has chosen."""

import random
import resource
import signal
import time
from pathlib import Path

import psutil

from tests.helpers.scripts.disturbed_runs import DisturbedRun

# Files of a process cannot be larger, as on a full disk: too small for a checkpoint.
SMALL_FILES_BYTES = 200_000
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
PAUSE_S = 3
# How often each fault is drawn, beside the others.
FAULTS = {
    "kill-worker": 5,
    "kill-launcher": 5,
    "abort-worker": 1,
    "stop-worker": 1,
    "pause": 1,
    "signal": 1,
    "two-signals": 1,
    "flip": 1,
    "full-disk": 1,
    "go-back": 1,
    "edit-data": 1,
}
# Faults of a whole start: the others come while it runs.
AT_START = ("full-disk", "go-back", "edit-data")
# Faults that end a process by SIGKILL.
KILLS = ("kill-worker", "kill-launcher", "flip")


def disturb(run: DisturbedRun, process, fault: str, chance: random.Random) -> tuple[str, str]:
    """Disturb a run in one way; what was done. The launcher is killed where that way is not possible yet."""
    workers = run.workers()
    worker = workers[chance.choice(sorted(workers))] if workers else None
    try:
        if fault in ("kill-worker", "abort-worker") and worker is not None:
            worker.send_signal(signal.SIGKILL if fault == "kill-worker" else signal.SIGABRT)
            return fault, f"worker {worker.pid}"
        if fault == "stop-worker" and worker is not None and run.metrics():
            worker.suspend()  # for ever: launch.hang_seconds ends it
            return fault, f"worker {worker.pid}"
        if fault == "pause" and worker is not None:
            worker.suspend()
            time.sleep(PAUSE_S)
            worker.resume()
            return fault, f"{PAUSE_S} s"
        if fault in ("signal", "two-signals"):
            number = chance.choice(STOP_SIGNALS)
            process.send_signal(number)
            if fault == "two-signals":
                time.sleep(chance.uniform(0, 0.5))
                process.send_signal(signal.SIGINT)
            return fault, number.name
        if fault == "flip" and len(run.checkpoints()) > 1:
            process.kill()
            process.wait()
            return fault, flip_bit(run.checkpoints()[-1], chance)
    except psutil.NoSuchProcess:
        return f"{fault} (too late)", "it had ended"
    process.kill()
    process.wait()
    return "kill-launcher", f"process {process.pid}"


def flip_bit(checkpoint: Path, chance: random.Random) -> str:
    """Change one bit of a file of a checkpoint."""
    path = chance.choice(sorted(path for path in checkpoint.iterdir() if path.stat().st_size > 0))
    content = bytearray(path.read_bytes())
    position = chance.randrange(len(content))
    content[position] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return f"{checkpoint.name}/{path.name}, byte {position}"


def limit_files() -> None:
    """Let this process and its children write small files only."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILES_BYTES, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
