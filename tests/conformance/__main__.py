"""Run patterns of users' scripts with the line and without, and compare.

    python -m tests.conformance [GROUP ...] [--only NAME] [--workers 1,2,4] [--verbose] [--print]

Without groups, all of them. The exit code is 1 if a pattern comes out in another way than its entry says.
"""

import argparse
import sys
import time
from collections import Counter

from tests.conformance.harness import Harness
from tests.conformance.patterns import groups, read_patterns


def main(arguments):
    """Run the patterns, print complaints and counts; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"any of {', '.join(groups())}; all by default")
    parser.add_argument("--only", action="append", metavar="NAME", help="patterns whose names contain this")
    parser.add_argument("--workers", default="1,2,4", help="numbers of workers, separated by commas")
    parser.add_argument("--verbose", action="store_true", help="print each run and all its differences")
    parser.add_argument("--print", action="store_true", help="print the scripts instead of running them")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.groups) - set(groups()):
        parser.error(f"no groups: {', '.join(sorted(unknown))}; the groups are {', '.join(groups())}")
    patterns = [
        pattern
        for pattern in read_patterns(chosen.groups)
        if not chosen.only or any(part in pattern.name for part in chosen.only)
    ]
    if chosen.print:
        print("\n\n".join(f"# {pattern.name}\n{pattern.source(with_line=True)}" for pattern in patterns))
        return 0
    return run(patterns, [int(number) for number in chosen.workers.split(",")], verbose=chosen.verbose)


def run(patterns, workers, *, verbose):
    """Run the patterns; 1 if any complains."""
    counts, wrong, start = Counter(), [], time.monotonic()
    with Harness() as harness:
        for pattern in patterns:
            for outcome in harness.outcomes(pattern, workers):
                counts[outcome.kind] += 1
                wrong += [outcome] if outcome.complaint else []
                name = f"{pattern.group}/{pattern.name}"
                if outcome.complaint or verbose:
                    text = outcome.complaint or "as expected"
                    print(f"{name}, {outcome.workers} {outcome.plan}: {outcome.kind}: {text}", flush=True)
                if verbose:
                    print("".join(f"    {detail}\n" for detail in outcome.details[:20]), end="", flush=True)
    kinds = ", ".join(f"{number} {kind}" for kind, number in counts.most_common())
    seconds = time.monotonic() - start
    print(f"{len(patterns)} patterns, {counts.total()} runs in {seconds:.0f} s: {kinds}; {len(wrong)} not as expected")
    return 1 if wrong or not patterns else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
