"""Time and memory of the conformance suite's patterns with the line and without, on one worker, in turns.

    python -m tests.verify.cost [GROUP ...] [--only NAME] [--rounds 3] [--tiny]

Measured are the patterns that loop over `batches` and come out equal on one worker. A step lasts from one batch to the
next. The time of a run is the median over its steps without the first ones; the time of a pattern is that of its
fastest run, since neighbours only ever make a run slower. Memory is the peak resident set of the process.

The models are made wide and the batches tall (timed_script.py), for steps of a tenth of a second; `--tiny` leaves both
as they are. The exit code is 1 if a pattern is above the bounds of 1.05 x (`--tiny`: 1.3 x in time).
"""

import argparse
import json
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.conformance.harness import Harness
from tests.conformance.patterns import groups, read_patterns
from tests.helpers.scripts.fork_server import run_forked

TIMED_SCRIPT = Path(__file__).parent / "timed_script.py"
LOOP = re.compile(r"\bbatches\(")
MAX_RATIO, MAX_TINY_RATIO = 1.05, 1.3
TIMEOUT_S = 120
MIB = 2**20


@dataclass(frozen=True)
class Cost:
    """What a run of a pattern has cost."""

    step_s: float
    """The median time of a step."""
    peak_bytes: int
    """The peak resident set."""


@dataclass(frozen=True)
class Comparison:
    """A pattern without the line and with it."""

    name: str
    """Group and name of the pattern."""
    without: Cost
    """The fastest and the smallest run without the line."""
    with_line: Cost
    """The fastest and the smallest run with the line."""

    @property
    def time_ratio(self):
        """Step time with the line over step time without it."""
        return self.with_line.step_s / self.without.step_s

    @property
    def memory_ratio(self):
        """Peak memory with the line over peak memory without it."""
        return self.with_line.peak_bytes / self.without.peak_bytes


def main():
    """Print a row for each pattern and a summary; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"any of {', '.join(groups())}; all by default")
    parser.add_argument("--only", metavar="NAME", default="", help="patterns whose names contain this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="the models and batches of the suite as they are")
    options = parser.parse_args()
    patterns = [
        pattern
        for pattern in read_patterns(options.groups)
        if options.only in pattern.name and pattern.one.kind == "equal" and LOOP.search(pattern.script)
    ]
    bound = MAX_TINY_RATIO if options.tiny else MAX_RATIO
    print("| pattern | ms a step | with the line | time | MiB | with the line | memory |")
    print("|---|---|---|---|---|---|---|")
    found, unmeasured = [], []
    with Harness() as harness:
        for pattern in patterns:
            compared = compare(harness, pattern, options.rounds, tiny=options.tiny)
            if compared is None:
                unmeasured.append(pattern.name)
                continue
            found.append(compared)
            print(row(compared), flush=True)
    slow = [one.name for one in found if one.time_ratio > bound]
    large = [one.name for one in found if one.memory_ratio > MAX_RATIO]
    print(f"\n{len(found)} patterns; above {bound} x in time: {', '.join(slow) or 'none'};")
    print(f"above {MAX_RATIO} x in memory: {', '.join(large) or 'none'};")
    print(f"not measured, since a script fails at this size or has too few steps: {', '.join(unmeasured) or 'none'}")
    return 1 if slow or large or not found else 0


def row(one):
    """The table's row of a pattern."""
    times = f"{1000 * one.without.step_s:.1f} | {1000 * one.with_line.step_s:.1f} | {one.time_ratio:.2f}"
    sizes = f"{one.without.peak_bytes / MIB:.0f} | {one.with_line.peak_bytes / MIB:.0f} | {one.memory_ratio:.2f}"
    return f"| {one.name} | {times} | {sizes} |"


def compare(harness, pattern, rounds, *, tiny):
    """The costs of a pattern; None if a run without the line fails or has too few steps."""
    runs = {False: [], True: []}
    for number in range(rounds):
        # Each of the two goes first in turn.
        for with_line in (False, True) if number % 2 == 0 else (True, False):
            cost = measure(harness, pattern, with_line=with_line, tiny=tiny)
            if cost is None:
                return None
            runs[with_line].append(cost)
    best = {
        with_line: Cost(min(cost.step_s for cost in costs), min(cost.peak_bytes for cost in costs))
        for with_line, costs in runs.items()
    }
    return Comparison(f"{pattern.group}/{pattern.name}", best[False], best[True])


def measure(harness, pattern, *, with_line, tiny):
    """The cost of one run, in a process of its own; None if the script fails or has too few steps."""
    with tempfile.TemporaryDirectory(dir=harness.directory) as directory:
        script, result = Path(directory) / "script.py", Path(directory) / "result.json"
        script.write_text(pattern.source(with_line=with_line), encoding="utf-8")
        command = [TIMED_SCRIPT, script, result, *(["--tiny"] if tiny else [])]
        run_forked(command, cwd=Path(directory), env=harness.environment, timeout=TIMEOUT_S)
        found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else None
    return Cost(**found) if found else None


if __name__ == "__main__":
    sys.exit(main())
