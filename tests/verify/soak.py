"""Train on two workers for some minutes with a checkpoint every 20 steps: nothing may grow.

python -m tests.verify.soak [--minutes 30] [--workers 2] [--samples FILE.csv]

Every two seconds, the memory of each worker that is its own, its open descriptors and its threads are noted with the
step. The first quarter of the steps is the warm-up. After it, the line through the memory rises by less than 0.1 MiB in
100 steps, and the medians of descriptors and threads are not higher in the second half than in the first: a file that
is open while a checkpoint is saved is no leak.
"""

import argparse
import csv
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.helpers.scripts.disturbed_runs import DisturbedRun, kill_all

MIB = 2**20
MOST_MIB_PER_100_STEPS = 0.1
WARM_UP = 0.25
SECONDS_BETWEEN_SAMPLES = 2.0
FIRST_STEP_TIMEOUT_S = 600
END_TIMEOUT_S = 300
SETTINGS = ("train.steps=100000000", "checkpoint.every_steps=20", "log.every_steps=100", "launch.hang_seconds=600")
STOPPED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Sample:
    """A process at one moment."""

    process: str
    """Launcher or worker 0, 1."""
    step: int
    """The last step whose metrics were written."""
    memory: int
    """Bytes that no other process has (USS)."""
    descriptors: int
    """Open files, pipes and sockets."""
    threads: int
    """Threads of the process."""


def main() -> int:
    """Train, and judge the samples; the exit code is 1 if something grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--samples", type=Path, help="write the samples to this file")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="soak-"))
    run = DisturbedRun(directory, "tiny", 1)
    try:
        process = run.start(*SETTINGS, f"accelerator.workers={options.workers}")
        samples = take_samples(run, process, 60 * options.minutes)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=END_TIMEOUT_S)
        checkpoints = [path.name for path in run.checkpoints()]
    finally:
        kill_all(run)
        console = run.console()
        shutil.rmtree(directory, ignore_errors=True)
    if options.samples:
        with options.samples.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([vars(samples[0]), *(vars(sample).values() for sample in samples)])
    problems = judge(samples, print)
    if code != STOPPED:
        problems.append(f"exit code {code} instead of {STOPPED}: {console[-2000:]}")
    print(f"{samples[-1].step} steps in {options.minutes:g} min; checkpoints in the end: {', '.join(checkpoints)}")
    print("\n".join(problems) if problems else "nothing grew")
    return 1 if problems else 0


def take_samples(run: DisturbedRun, process, seconds: float) -> list[Sample]:
    """Samples of the launcher and the workers of a run for so long, from its first step on."""
    deadline = time.monotonic() + FIRST_STEP_TIMEOUT_S
    steps = StepCounter(run.run / "metrics.jsonl")
    while steps.last() < 1:
        assert process.poll() is None, run.console()
        assert time.monotonic() < deadline, "no step"
        time.sleep(0.5)
    watched = {"launcher": psutil.Process(process.pid)}
    watched |= {f"worker {rank}": worker for rank, worker in sorted(run.workers().items())}
    samples, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, run.console()
        step = steps.last()
        for name, watched_process in watched.items():
            with watched_process.oneshot():
                memory = watched_process.memory_full_info().uss
                threads = watched_process.num_threads()
            samples.append(Sample(name, step, memory, watched_process.num_fds(), threads))
        time.sleep(SECONDS_BETWEEN_SAMPLES)
    return samples


class StepCounter:
    """Counts the lines of the metrics of a run, reading each only once."""

    def __init__(self, path: Path) -> None:
        self._path, self._position, self._lines = path, 0, 0

    def last(self) -> int:
        """The last step; -1 before there is a line. The first line is of step 0."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._position)
                content = file.read()
            self._position, self._lines = self._position + len(content), self._lines + content.count(b"\n")
        return self._lines - 1


def judge(samples: list[Sample], say: Callable[[str], None]) -> list[str]:
    """What grew after the warm-up; `say` gets a line for each process."""
    last = samples[-1].step
    problems = []
    for name in dict.fromkeys(sample.process for sample in samples):
        own = [sample for sample in samples if sample.process == name and sample.step >= WARM_UP * last]
        steps, memory = [sample.step for sample in own], [sample.memory / MIB for sample in own]
        growth = 100 * statistics.linear_regression(steps, memory).slope
        middle = (own[0].step + last) / 2
        halves = [sample for sample in own if sample.step < middle], [sample for sample in own if sample.step >= middle]
        descriptors = [statistics.median_low(sample.descriptors for sample in half) for half in halves]
        threads = [statistics.median_low(sample.threads for sample in half) for half in halves]
        say(
            f"{name}: steps {steps[0]} to {last}, {memory[0]:.1f} to {memory[-1]:.1f} MiB, {growth:+.4f} MiB in 100 "
            f"steps; medians of {descriptors[0]}, then {descriptors[1]} descriptors; {threads[0]}, then {threads[1]} "
            "threads"
        )
        if not growth < MOST_MIB_PER_100_STEPS:
            problems.append(f"{name}: memory grows by {growth:.3f} MiB in 100 steps")
        problems += [f"{name}: {descriptors} descriptors"] if descriptors[1] > descriptors[0] else []
        problems += [f"{name}: {threads} threads"] if threads[1] > threads[0] else []
    return problems


if __name__ == "__main__":
    sys.exit(main())
