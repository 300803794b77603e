"""Kill trainings at random moments until there were so many SIGKILLs, and compare their ends with a quiet run.

python -m tests.verify.kills [--kills 100] [--workers 1,2] [--seed 1]

Each start is a fork of a process that has imported torch and transformers, so that a kill costs a second or two and not
half a minute: what it cannot find are faults of the first seconds and of launchers, which `tests.verify.chaos` finds.
The workers are those of a world as torchrun starts it. One of them or all of them are killed. Then the training is
started again with `--resume auto`. At its end, all losses, gradient norms and weights have to be the bits of the run
that nobody disturbed.
"""

import argparse
import contextlib
import os
import random
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.conftest import ROOT
from tests.helpers.scripts.disturbed_runs import DisturbedRun
from tests.helpers.scripts.fork_server import start_forked

STEPS = 12
ABSENT = "has not come to MASTER_ADDR"
# A checkpoint and an evaluation every second step: most moments are in neither the one nor the other.
SETTINGS = ("checkpoint.every_steps=2", "log.eval_every_steps=2", "log.every_steps=1")
# After so many, a round is left to end.
KILLS_OF_A_ROUND = 12
TIMEOUT_S = 600.0
KILLED = -signal.SIGKILL


def main() -> int:
    """Run rounds until there were so many kills; the exit code is 1 if one did not end as the quiet run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--workers", default="1,2", help="numbers of workers, in turns (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    numbers = [int(number) for number in options.workers.split(",")]
    print(f"seed {options.seed}, {options.kills} kills, workers: {options.workers}", flush=True)
    chance, counts = random.Random(options.seed), Counter[str]()
    directory = Path(tempfile.mkdtemp(prefix="kills-"))
    problems: list[str] = []
    quiet: dict[int, tuple[DisturbedRun, float]] = {}
    rounds = 0
    quiet_run(directory / "first", 1)  # which waits until the process to fork has imported its libraries
    while counts.total() < options.kills and not problems:
        workers = numbers[rounds % len(numbers)]
        if workers not in quiet:
            quiet[workers] = quiet_run(directory / f"quiet-{workers}", workers)
        expected, seconds = quiet[workers]
        rounds += 1
        run = DisturbedRun(directory / f"round-{rounds}", "tiny", STEPS)
        before = counts.total()
        problems = killed_round(run, workers, seconds, KILLS_OF_A_ROUND, chance, counts) or run.differences(expected)
        problems += run.leftovers()
        said = "equal" if not problems else "NOT equal"
        print(f"round {rounds} on {workers} worker(s): {counts.total() - before} kills, {said}", flush=True)
        if not problems:
            shutil.rmtree(run.directory)
    print(f"{rounds} rounds, {counts.total()} SIGKILLs: {', '.join(f'{n} {phase}' for phase, n in counts.items())}")
    print("\n".join([*problems, f"kept: {directory}"]) if problems else "all ended as the quiet run")
    if not problems:
        shutil.rmtree(directory, ignore_errors=True)
    return 1 if problems else 0


def quiet_run(directory: Path, workers: int) -> tuple[DisturbedRun, float]:
    """A run that nobody disturbs, and how long it took."""
    run = DisturbedRun(directory, "tiny", STEPS)
    begun = time.monotonic()
    finished = [script.finish(TIMEOUT_S) for script in start(run, workers)]
    assert all(process.returncode == 0 for process in finished), finished
    return run, time.monotonic() - begun


def start(run: DisturbedRun, workers: int) -> list:
    """The scripts of all workers of a run that goes on from its last checkpoint, if it has one."""
    command = [ROOT / "train_gpt.py", "--config", run.config, "--resume", "auto", *SETTINGS]
    command.append(f"accelerator.workers={workers}")
    world: dict[str, str] = {}
    if workers > 1:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(workers))
        world = {**sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world else {} for rank in range(workers)]
    return [start_forked(command, cwd=ROOT, env={**run.environment, **variables}) for variables in ranks]


def killed_round(
    run: DisturbedRun, workers: int, seconds: float, most: int, chance: random.Random, counts: Counter[str]
) -> list[str]:
    """Train to the end, killed up to `most` times; what went wrong."""
    for number in range(10 * most):
        scripts = start(run, workers)
        phase = ""
        if number < most:
            victims = chance.choice([scripts, scripts[:1], scripts[-1:]])
            phase = kill_after(run, scripts, victims, chance.uniform(0, seconds))
        finished = [script.finish(TIMEOUT_S) for script in scripts]
        codes = [process.returncode for process in finished]
        counts[phase] += codes.count(KILLED)
        if not any(codes):
            return []
        # The others of a worker that was killed end with the error of a lost connection, or of one that never came.
        strange = [
            process for process in finished if process.returncode not in {0, 1, KILLED} and ABSENT not in process.stderr
        ]
        if KILLED not in codes or strange:
            return [f"exit codes {codes}: {[process.stderr[-1000:] for process in finished]}"]
    return [f"not ended after {10 * most} starts"]


def kill_after(run: DisturbedRun, scripts: list, victims: list, seconds: float) -> str:
    """Kill some workers after a time, unless they have ended by then; the phase of the first worker."""
    processes = []
    for script in victims:
        with contextlib.suppress(ProcessLookupError):
            processes.append(os.pidfd_open(script.pid))
    ended, _, _ = select.select(processes[:1], [], [], seconds)
    phase = phase_of(run, scripts[0].output()) if not ended else ""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)
    return phase


def phase_of(run: DisturbedRun, said: str) -> str:
    """The phase of a run whose first worker has said so much."""
    if "Reading and tokenizing" in said and "Training rows" not in said:
        return "preparing data"
    last = max((row["step"] for row in run.metrics()), default=-1)
    if "Model: " not in said or last < 0:
        return "starting"
    if any((run.run / "checkpoints").glob(".step-*-unfinished")):
        return "saving a checkpoint"
    if (run.run / ".model-unfinished").exists():
        return "saving the model"
    if last == STEPS:
        return "finishing"
    if f"[Step {last + 1}/" in said:
        return "evaluating"
    return "training" if "[Step " in said else "starting"


if __name__ == "__main__":
    sys.exit(main())
