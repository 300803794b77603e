"""Disturb trainings on two workers at random, until so many minutes are over, and compare their ends with a quiet run.

python -m tests.verify.chaos [--minutes 20] [--seed 1] [--steps 60] [--faults kill-worker,flip]

A run that ends before its last step is started again with `--resume auto`, as a batch system would do it, and its
workers are started again by `launch.max_restarts`. At its end, all losses, gradient norms and weights have to be the
bits of the run that nobody disturbed, and nothing may be left.
"""

import argparse
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from tests.helpers.scripts.disturbed_runs import DisturbedRun, kill_all

MAX_STARTS = 60
# Of one start, until it counts as stuck.
START_TIMEOUT_S = 600
# Files of a process cannot be larger, as on a full disk: too small for a checkpoint.
SMALL_FILES_BYTES = 200_000
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
FAULTS = (
    "kill-worker",
    "kill-launcher",
    "abort-worker",
    "stop-worker",
    "pause",
    "signal",
    "two-signals",
    "flip",
    "full-disk",
    "go-back",
)


def main() -> int:
    """Run rounds until the time is over; the exit code is 1 if one did not end as the quiet run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--keep", action="store_true", help="keep the directory")
    options = parser.parse_args()
    faults = options.faults.split(",")
    assert set(faults) <= set(FAULTS), f"allowed are {', '.join(FAULTS)}"
    print(f"seed {options.seed}, {options.minutes:g} minutes, faults: {', '.join(faults)}", flush=True)
    chance, counts = random.Random(options.seed), Counter()
    end = time.monotonic() + 60 * options.minutes
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    problems: list[str] = []
    try:
        quiet = DisturbedRun(directory / "quiet", "tiny", options.steps)
        begun = time.monotonic()
        assert quiet.start().wait(timeout=START_TIMEOUT_S) == 0, quiet.console()
        quiet_s = time.monotonic() - begun
        print(f"quiet run: {quiet_s:.0f} s", flush=True)
        rounds = 0
        while time.monotonic() < end and not problems:
            rounds += 1
            run = DisturbedRun(directory / f"round-{rounds}", "tiny", options.steps)
            problems = disturbed_round(run, chance, faults, quiet_s, end, counts) or run.differences(quiet)
            problems += run.leftovers()
            print(f"round {rounds}: {'equal' if not problems else 'NOT equal'}", flush=True)
            if problems:
                print(run.console()[-4000:])
            else:
                shutil.rmtree(run.directory)
    finally:
        for leftover in directory.iterdir():
            kill_all(DisturbedRun(leftover, "tiny", options.steps))
        if not (options.keep or problems):
            shutil.rmtree(directory, ignore_errors=True)
    print(f"{rounds} rounds, faults: {', '.join(f'{count} {fault}' for fault, count in sorted(counts.items()))}")
    print("\n".join([*problems, f"kept: {directory}"]) if problems else "all ended as the quiet run")
    return 1 if problems else 0


def disturbed_round(
    run: DisturbedRun, chance: random.Random, faults: list[str], quiet_s: float, end: float, counts: Counter
) -> list[str]:
    """Train to the end under faults; what went wrong. After `end` (of time.monotonic) nobody disturbs any more."""
    for _ in range(MAX_STARTS):
        is_disturbed = time.monotonic() < end
        fault = chance.choice(faults) if is_disturbed else ""
        arguments = ["--resume", "auto", f"launch.max_restarts={chance.choice((0, 2))}"]
        limited = {}
        if fault == "full-disk":
            limited["preexec_fn"] = _limit_files
        checkpoints = run.checkpoints()
        if fault == "go-back" and len(checkpoints) > 1:
            arguments[1] = str(chance.choice(checkpoints[:-1]))
        process = run.start(*arguments, **limited)
        moment = time.monotonic() + chance.uniform(0, 1.2 * quiet_s)
        while process.poll() is None and time.monotonic() < moment:
            time.sleep(0.05)
        if process.poll() is None and is_disturbed:
            fault, done = disturb(run, process, fault, chance)
            counts[fault] += 1
            print(f"  {fault:14} after step {len(run.metrics()) - 1}: {done}", flush=True)
        try:
            code = process.wait(timeout=START_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            return [f"stuck after {fault}: {error}"]
        if "Traceback (most recent call last)" in run.console():
            return [f"a traceback after {fault}"]
        if code == 0:
            return []
        if code == 2 and fault != "full-disk":
            return [f"exit code 2 after {fault}"]
    return [f"not ended after {MAX_STARTS} starts"]


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
            time.sleep(3)
            worker.resume()
            return fault, "3 s"
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
        if fault in ("full-disk", "go-back"):
            return fault, "from the start"
    except psutil.NoSuchProcess:
        return fault, "it had ended"
    process.kill()
    return "kill-launcher", f"process {process.pid}"


def flip_bit(checkpoint: Path, chance: random.Random) -> str:
    """Change one bit of a file of a checkpoint."""
    path = chance.choice(sorted(path for path in checkpoint.iterdir() if path.stat().st_size > 0))
    content = bytearray(path.read_bytes())
    position = chance.randrange(len(content))
    content[position] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return f"{checkpoint.name}/{path.name}, byte {position}"


def _limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILES_BYTES, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


if __name__ == "__main__":
    sys.exit(main())
