"""Run a script of the suite, and write what it has reported and how it has ended: `run_script.py SCRIPT`.

The environment says where to (`CONFORMANCE_RESULTS`), under which plan (`CONFORMANCE_PLAN`), and with which of the
`faults` (`CONFORMANCE_FAULT`).
"""

import os
import runpy
import sys
import traceback
from pathlib import Path

import torch

from moreh.errors import MorehError
from tests.conformance import prelude
from tests.conformance.faults import put_back
from tests.conformance.plans import force_plan, plan_for_fixed_devices

# Scripts replace it, and so does the line.
_SAVE = torch.save


def main(script):
    """Run the script; the exit code is 1 if an exception has ended it."""
    # Read now: the line takes the variables of the launcher out of the environment.
    path = Path(f"{os.environ['CONFORMANCE_RESULTS']}-{os.environ.get('RANK', '0')}")
    plan_for_fixed_devices()
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    has_plan = force_plan(os.environ["CONFORMANCE_PLAN"]) if several else []
    if fault := os.environ["CONFORMANCE_FAULT"]:
        put_back(fault)
    sys.argv = [script]
    error = None
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception as raised:
        traceback.print_exc()
        error = {"type": type(raised).__name__, "text": str(raised), "is_ours": isinstance(raised, MorehError)}
    results = {"values": prelude.reported(), "error": error, "has_plan": all(has_plan)}
    _SAVE(results, path)
    return 0 if error is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
