"""The phase that a disturbed run is in, by the heartbeat of its first worker, its files and its console."""

import time
from pathlib import Path

from moreh.runtime.launch.paths import heartbeat_path
from moreh.runtime.launch.watch.heartbeat import read_heartbeat
from tests.helpers.scripts.disturbed_runs import DisturbedRun

PHASES = ("starting", "preparing data", "loading", "evaluating", "training", "saving", "finishing")
SECONDS_BETWEEN_LOOKS = 0.01


def phase_of(run: DisturbedRun, steps: int) -> str:
    """The phase of a run of so many steps."""
    logs = _newest_logs(run.directory / "state" / "logs")
    heartbeat = read_heartbeat(heartbeat_path(logs, 0))
    if heartbeat.count == 0:
        return "starting"
    console = run.console()[run.begun_at :]
    if console.rfind("Reading and tokenizing") > console.rfind("Tokenized data"):
        return "preparing data"
    if "save_model" in heartbeat.where or len(run.metrics()) > steps:
        return "finishing"
    if "evaluate" in heartbeat.where:
        return "evaluating"
    if heartbeat.step is None:
        return "loading"
    if "save" in heartbeat.where or any((run.run / "checkpoints").glob(".step-*-unfinished")):
        return "saving"
    return "training"


def wait_for_phase(run: DisturbedRun, process, phase: str, steps: int, timeout_s: float) -> bool:
    """Wait until a run is in a phase; False if its process ends before, or the time is over."""
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        if phase_of(run, steps) == phase:
            return True
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return False


def _newest_logs(parent: Path) -> Path:
    """The directory of the logs of the workers that were started last."""
    jobs = [path for path in parent.glob("*") if path.name.isdecimal()]
    if not jobs:
        return parent
    logs = max(jobs, key=lambda path: int(path.name))
    restarts = list(logs.glob("restart-*"))
    return max(restarts, key=lambda path: int(path.name.removeprefix("restart-")), default=logs)
