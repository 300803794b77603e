"""Fuzz for some minutes: python -m tests.fuzz [--seed N] [--minutes M] [TARGET ...]; with make fuzz, SEED and MINUTES.

What is found is printed with the example that shows it, as small as hypothesis can make it; the exit code is 1. Mend
it, and add the example to the table of tests/bad_input.
"""

import argparse
import os
import sys
import time
import traceback

from tests.fuzz.running import fuzz
from tests.fuzz.targets import TARGETS

PER_BATCH = 100


def main() -> int:
    """Fuzz; returns the exit code."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    names = [target.__name__ for target in TARGETS]
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(names)}; by default all")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each target (default: %(default)g)")
    arguments = parser.parse_args()
    if unknown := set(arguments.targets) - set(names):
        parser.error(f"no target {min(unknown)!r}: give some of {', '.join(names)}")
    print(f"seed {arguments.seed}")
    has_found = False
    for target in TARGETS:
        if arguments.targets and target.__name__ not in arguments.targets:
            continue
        end, examples, seed = time.monotonic() + 60 * arguments.minutes, 0, arguments.seed
        try:
            while time.monotonic() < end:
                fuzz(target, seed, PER_BATCH)
                examples, seed = examples + PER_BATCH, seed + 1
            print(f"{target.__name__}: {examples:,} examples, nothing found", flush=True)
        except Exception:
            has_found = True
            traceback.print_exc()
            print(f"{target.__name__}: found the above with seed {seed}", flush=True)
    return int(has_found)


if __name__ == "__main__":
    sys.exit(main())
