"""Run a script of the conformance suite and write what a step costs: timed_script.py SCRIPT RESULT [--tiny]

Nothing is written if the script fails or its loop has too few steps.
"""

import json
import resource
import runpy
import statistics
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

from moreh.runtime.engine import hook
from tests.conformance import prelude

ROWS_FACTOR = 8
STEPS, WARM_UP_STEPS, MIN_STEPS = 14, 4, 6
# Of each model's configuration, the width of its MLPs: for a step of a tenth of a second on a core, with as many FLOPs
# as the fast path asks for (hook.MIN_FLOPS).
WIDTHS = {
    "llama": ("intermediate_size", 5120),
    "mistral": ("intermediate_size", 5120),
    "qwen2": ("intermediate_size", 5120),
    "gpt_neox": ("intermediate_size", 8192),
    "opt": ("ffn_dim", 8192),
    "gpt2": ("n_inner", 8192),
}

_batch = prelude.batch
_loops = []


class TimedBatches(list):
    """Batches that note when a loop takes each of them."""

    def __iter__(self):
        times = []
        _loops.append(times)
        for batch in super().__iter__():
            times.append(time.perf_counter())
            yield batch
        times.append(time.perf_counter())


def main(script, result, *, tiny):
    """Run the script with more batches, a wider model and more rows."""
    rows_factor = 1 if tiny else ROWS_FACTOR

    def batch(step=0, rows=8, length=12):
        return _batch(step, rows * rows_factor, length)

    def batches(count, rows=8, length=12):
        return TimedBatches(batch(step, rows, length) for step in range(max(count, STEPS)))

    prelude.batch, prelude.batches = batch, batches
    # Small batches are left to the model's own forward pass, as a user's are.
    hook.MIN_FLOPS = getattr(hook, "MIN_FLOPS_OF_USERS", hook.MIN_FLOPS)
    if not tiny:
        widen_models()
    sys.argv = [script]
    runpy.run_path(script, run_name="__main__")
    steps = [later - earlier for times in _loops for earlier, later in pairwise(times)]
    if len(steps) >= WARM_UP_STEPS + MIN_STEPS:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = {"step_s": statistics.median(steps[WARM_UP_STEPS:]), "peak_bytes": peak}
        result.write_text(json.dumps(found), encoding="utf-8")


def widen_models():
    """Give the MLPs of the prelude's models more columns, which scripts hardly ever look at."""
    for maker, (name, width) in WIDTHS.items():
        setattr(prelude, maker, partial(getattr(prelude, maker), **{name: width}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), tiny="--tiny" in sys.argv[3:])
