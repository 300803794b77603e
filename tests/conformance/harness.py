"""Runs a pattern without the line and with it, on some numbers of workers, and compares what the runs have in common.

with Harness() as harness:
    for outcome in harness.outcomes(pattern, [1, 2, 4]):
        print(outcome.workers, outcome.kind, outcome.complaint)
"""

import os
import pickle
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.conformance.comparing import file_problems, text_problems, value_problems
from tests.conformance.patterns import Expectation, Pattern
from tests.conformance.plans import plan_in_turn
from tests.helpers.scripts.fork_server import run_forked_workers

ROOT = Path(__file__).parents[2]
RUN_SCRIPT = Path(__file__).parent / "run_script.py"
TIMEOUT_S = 90
# Another program may take the port of the first rank before the rank does.
PORT_TAKEN, ATTEMPTS = "EADDRINUSE", 3
# What the line writes to the working directory besides what the script writes.
FILES_OF_THE_LINE = ("advanced_parallelization_selected_config.dump", "autoconfig_log.dump")


@dataclass(frozen=True)
class Run:
    """The results of a script's run."""

    ranks: list
    """Of each rank, what `run_script` has written: `values`, `error`, `has_plan`; None if it ended without writing."""
    output: str
    """The first rank's standard output, without the lines of the log."""
    errors: str
    """The standard error of the first rank that failed, else of the first rank."""
    directory: Path
    """The working directory."""


@dataclass(frozen=True)
class Outcome:
    """A run with the line, compared with the run without."""

    pattern: Pattern
    workers: int
    plan: str
    """The name of the plan that the workers have carried out, "auto" if no plan of that name can run the script."""
    kind: str
    """`equal`, `refused`, `differs`, or `failed` if there is nothing to compare."""
    details: tuple[str, ...]
    """The message of a refusal, or the differences."""
    complaint: str
    """The reason why the outcome is not the expected one; empty if it is."""


class Harness:
    """A directory for runs, with a registry of its own."""

    def __init__(self):
        self.directory = Path(tempfile.mkdtemp(prefix="moreh-conformance-"))
        self.environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "GOMP_SPINCOUNT": "1000",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "MOREH_STATE_DIR": str(self.directory / "state"),
            "MOREH_WORKERS": "1",
            "MOREH_WAIT": "0",
        }

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.directory, ignore_errors=True)

    def outcomes(self, pattern, workers=(1, 2, 4)):
        """Outcomes on each number of workers for which the pattern has a plan."""
        plain = self.run(pattern, 1, with_line=False)
        if problem := _problem_of_plain_run(plain, pattern.raises):
            yield Outcome(pattern, 1, "", "failed", (), f"the plain run failed: {problem}")
            return
        for number in workers:
            plan = plan_in_turn(pattern.name, number, pattern.plans if number > 1 else ())
            if plan is not None:
                planned = self.run(pattern, number, plan)
                carried_out = plan if all(rank is None or rank["has_plan"] for rank in planned.ranks) else "auto"
                yield judged(pattern, number, carried_out, *compare(plain, planned, pattern.tolerance))

    def run(self, pattern, workers, plan="auto", *, with_line=True, fault=""):
        """Run the script in a directory of its own; `fault` names one of the `faults` that the runtime then has."""
        for _ in range(ATTEMPTS):
            done = self._run(pattern, workers, plan, with_line=with_line, fault=fault)
            if PORT_TAKEN not in done.errors:
                break
        return done

    def _run(self, pattern, workers, plan, *, with_line, fault):
        place = Path(tempfile.mkdtemp(prefix=f"{pattern.name}-", dir=self.directory))
        cwd = place / "work"
        cwd.mkdir()
        script = place / "script.py"
        script.write_text(pattern.source(with_line=with_line), encoding="utf-8")
        variables = {
            "CONFORMANCE_RESULTS": str(place / "results"),
            "CONFORMANCE_PLAN": plan,
            "CONFORMANCE_FAULT": fault,
        }
        processes = run_forked_workers(
            [RUN_SCRIPT, script], workers, cwd=cwd, env=self.environment | variables, timeout=TIMEOUT_S
        )
        failed = [process for process in processes if process.returncode] or processes
        return Run(
            [_results(place / f"results-{rank}") for rank in range(workers)],
            _without_log(processes[0].stdout),
            failed[0].stderr,
            cwd,
        )


def compare(plain, planned, tolerance):
    """The kind of a run with the line, and its details."""
    if any(rank is None for rank in planned.ranks):
        return "failed", [f"did not end in time, or was killed: {_last_line(planned.errors)}"]
    errors = [rank["error"] for rank in planned.ranks]
    expected = plain.ranks[0]
    if all(error is not None and error["is_ours"] for error in errors):
        return "refused", [errors[0]["text"]]
    problems = []
    for number, (rank, error) in enumerate(zip(planned.ranks, errors, strict=True)):
        found = value_problems(expected["values"], rank["values"], tolerance)
        if error != expected["error"]:
            found.insert(0, f"ends with {_text(error)} instead of {_text(expected['error'])}")
        problems += [f"rank {number}: {problem}" if len(errors) > 1 else problem for problem in found]
    problems += text_problems("output", plain.output, planned.output, tolerance)
    for name in FILES_OF_THE_LINE:
        (planned.directory / name).unlink(missing_ok=True)
    problems += file_problems(plain.directory, planned.directory, tolerance)
    return ("differs" if problems else "equal"), problems


def judged(pattern, workers, plan, kind, details):
    """The outcome, with a complaint where it is not what the pattern expects."""
    expected = pattern.expectation(workers)
    complaint = ""
    if kind != expected.kind:
        complaint = f"expected {expected}, is {Expectation(kind, '; '.join(details[:3]))}"
    elif kind == "refused" and expected.words not in " ".join(details[0].split()):
        complaint = f"expected {expected}, but the message is: {details[0]}"
    return Outcome(pattern, workers, plan, kind, tuple(details), complaint)


def _problem_of_plain_run(run, raises):
    """Why there is nothing to compare with, or an empty text: a script that cannot run is equal to itself."""
    results = run.ranks[0]
    if results is None:
        return _last_line(run.errors) or "it ended without results"
    if (results["error"] or {"type": ""})["type"] != raises:
        return f"it ends with {_text(results['error'])}, and its entry says {raises or 'no error'}"
    if not (raises or results["values"] or run.output or any(run.directory.iterdir())):
        return "it reports no value, prints no line and writes no file"
    return ""


def _results(path):
    try:
        return torch.load(path, weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
        return None


def _without_log(output):
    return "".join(line for line in output.splitlines(keepends=True) if not line.startswith("[info]"))


def _text(error):
    return f"{error['type']}: {' '.join(error['text'].split())[:300]}" if error else "no error"


def _last_line(text):
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
