"""Disturb trainings on two workers at random, until so many minutes are over, and compare their ends with a quiet run.

python -m tests.verify.chaos [--minutes 20] [--seed 1] [--steps 60] [--faults kill-worker,flip] [--timeout 1800]

A run that ends before its last step is started again with `--resume auto`, as a batch system would do it, and its
workers are started again by `launch.max_restarts`. At its end, all losses, gradient norms and weights have to be the
bits of the run that nobody disturbed, and nothing may be left.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.scripts.disturbed_runs import DisturbedRun, kill_all
from tests.verify.disturbing import AT_START, FAULTS, KILLS, disturb, limit_files
from tests.verify.phases import PHASES, phase_of, wait_for_phase

MAX_STARTS = 60
# After so many faults, a round is left to end.
MAX_FAULTS = 25
# A fault comes so long after the beginning of the phase that was drawn.
LONGEST_DELAY_S = 0.3
EXIT_USER_ERROR = 2


@dataclass
class Chaos:
    """What is done to the runs, and what was done."""

    chance: random.Random
    """Draws faults, phases and moments."""
    faults: list[str]
    """Those that may be drawn."""
    settings: list[str]
    """Of all runs."""
    steps: int
    """Of a run."""
    end: float
    """After this time of time.monotonic, nobody disturbs any more."""
    timeout_s: float
    """Of one start, until it counts as stuck."""
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Faults by their kind and phase."""

    def draw(self, allowed: list[str]) -> str:
        """One of the faults, by their weights."""
        return self.chance.choices(allowed, [FAULTS[fault] for fault in allowed])[0]

    def count(self, fault: str, phase: str, run: DisturbedRun, done: str) -> None:
        """Note a fault."""
        self.counts[fault, phase] += 1
        print(f"  {fault:14} {phase:15} after step {max(len(run.metrics()) - 1, 0):3}: {done}", flush=True)


def main() -> int:
    """Run rounds until the time is over; the exit code is 1 if one did not end as the quiet run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds until a start counts as stuck")
    parser.add_argument("--hang-seconds", type=float, default=10.0, help="launch.hang_seconds; more on a busy machine")
    parser.add_argument("--keep", action="store_true", help="keep the directory")
    options = parser.parse_args()
    faults = options.faults.split(",")
    assert set(faults) <= FAULTS.keys(), f"allowed are {', '.join(FAULTS)}"
    print(f"seed {options.seed}, {options.minutes:g} minutes, faults: {', '.join(faults)}", flush=True)
    settings = [f"launch.hang_seconds={options.hang_seconds:g}"]
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    problems: list[str] = []
    rounds = 0
    try:
        quiet = DisturbedRun(directory / "quiet", "tiny", options.steps)
        assert quiet.start(*settings).wait(timeout=options.timeout) == 0, quiet.console()
        end = time.monotonic() + 60 * options.minutes
        chaos = Chaos(random.Random(options.seed), faults, settings, options.steps, end, options.timeout)
        while time.monotonic() < end and not problems:
            rounds += 1
            run = DisturbedRun(directory / f"round-{rounds}", "tiny", options.steps)
            problems = disturbed_round(run, chaos) or run.differences(quiet)
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
    print(f"{rounds} rounds\n{table_of(chaos.counts)}")
    print("\n".join([*problems, f"kept: {directory}"]) if problems else "all ended as the quiet run")
    return 1 if problems else 0


def disturbed_round(run: DisturbedRun, chaos: Chaos) -> list[str]:
    """Train to the end under faults; what went wrong."""
    before = chaos.counts.total()
    for _ in range(MAX_STARTS):
        is_disturbed = time.monotonic() < chaos.end and chaos.counts.total() - before < MAX_FAULTS
        fault = chaos.draw(chaos.faults) if is_disturbed else ""
        arguments = ["--resume", "auto", *chaos.settings, f"launch.max_restarts={chaos.chance.choice((0, 2))}"]
        checkpoints = run.checkpoints()
        if fault == "edit-data" and checkpoints:
            problems = refuse_other_data(run, chaos)
            if problems:
                return problems
            continue
        limited = {"preexec_fn": limit_files} if fault == "full-disk" else {}
        if fault == "go-back" and len(checkpoints) > 1:
            arguments[1] = str(chaos.chance.choice(checkpoints[:-1]))
        if fault == "full-disk" or (fault == "go-back" and len(checkpoints) > 1):
            chaos.count(fault, "starting", run, arguments[1])
        process = run.start(*arguments, **limited)
        kinds = [kind for kind in chaos.faults if kind not in AT_START]
        while is_disturbed and kinds and process.poll() is None and time.monotonic() < chaos.end:
            disturb_once(run, process, fault if fault in kinds else chaos.draw(kinds), chaos)
            fault = ""
        try:
            code = process.wait(timeout=chaos.timeout_s)
        except subprocess.TimeoutExpired as error:
            return [f"stuck: {error}"]
        if "Traceback (most recent call last)" in run.console():
            return ["a traceback"]
        if code == 0:
            return []
        if code == EXIT_USER_ERROR and not limited:
            return [f"exit code {EXIT_USER_ERROR}"]
    return [f"not ended after {MAX_STARTS} starts"]


def disturb_once(run: DisturbedRun, process, fault: str, chaos: Chaos) -> None:
    """Disturb a run when it is in a phase that is drawn, unless it ends before."""
    phase = chaos.chance.choice(PHASES)
    delay_s = chaos.chance.uniform(0, LONGEST_DELAY_S)
    if phase == "preparing data" and phase_of(run, chaos.steps) == "starting":
        shutil.rmtree(run.directory / "cache", ignore_errors=True)
    if wait_for_phase(run, process, phase, chaos.steps, chaos.timeout_s):
        time.sleep(delay_s)
        phase = phase_of(run, chaos.steps)
        if process.poll() is None:
            fault, done = disturb(run, process, fault, chaos.chance)
            chaos.count(fault, phase, run, done)


def refuse_other_data(run: DisturbedRun, chaos: Chaos) -> list[str]:
    """Change a row of the data, and see that the run does not go on with it; then change it back."""
    data = run.directory / "pairs.jsonl"
    content = data.read_text(encoding="utf-8")
    data.write_text(content.replace("x + 1", "x + 2", 1), encoding="utf-8")
    begun_at = len(run.console())
    try:
        code = run.start("--resume", "auto", *chaos.settings).wait(timeout=chaos.timeout_s)
    finally:
        data.write_text(content, encoding="utf-8")
    chaos.count("edit-data", "starting", run, "a row was changed, and changed back")
    if code != EXIT_USER_ERROR or "--resume-force" not in run.console()[begun_at:]:
        return [f"other data: exit code {code}: {run.console()[begun_at:]}"]
    return []


def table_of(counts: Counter[tuple[str, str]]) -> str:
    """Faults by kind and phase, and how many processes were killed."""
    kinds = sorted({fault for fault, _ in counts})
    lines = [f"{'fault':22}" + "".join(f"{phase:>16}" for phase in PHASES)]
    lines += [f"{kind:22}" + "".join(f"{counts[kind, phase]:16}" for phase in PHASES) for kind in kinds]
    kills = sum(count for (fault, _), count in counts.items() if fault in KILLS)
    return "\n".join([*lines, f"{counts.total()} faults, {kills} of them SIGKILL"])


if __name__ == "__main__":
    sys.exit(main())
