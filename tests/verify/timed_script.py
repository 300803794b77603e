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

from tests.conformance import prelude

# Of a step of tens of milliseconds on a core.
WIDTH = 4096
ROWS_FACTOR = 8
STEPS, WARM_UP_STEPS, MIN_STEPS = 14, 4, 6
# Of each model's configuration, the width of its MLPs.
WIDTHS = {
    "llama": "intermediate_size",
    "mistral": "intermediate_size",
    "qwen2": "intermediate_size",
    "gpt_neox": "intermediate_size",
    "opt": "ffn_dim",
    "gpt2": "n_inner",
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
    """Give the MLPs of the prelude's models `WIDTH` columns, which scripts hardly ever look at."""
    for maker, name in WIDTHS.items():
        setattr(prelude, maker, partial(getattr(prelude, maker), **{name: WIDTH}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), tiny="--tiny" in sys.argv[3:])
