"""Measure the speedup of the one line on one machine: a training without it, with it, and on two workers.

python benchmarks/one_line.py [--rounds 3] [--steps 60]

The default GPT is trained in turns, each time in a process of its own. Speeds are medians over the steps of all rounds,
without the first steps. Memory is the peak resident set of a process, shared libraries included; with two workers, each
of them has that much.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
# Steps at the beginning of a run that do not count.
WARM_UP_STEPS = 10
VARIANTS = {
    "without the line": ["accelerator.advanced_parallelization=null"],
    "with it, float32": ["accelerator.advanced_parallelization.mixed_precision=false"],
    "with it": ["accelerator.advanced_parallelization.mixed_precision=true"],
    "with it, 2 workers": ["accelerator.advanced_parallelization.mixed_precision=true", "accelerator.workers=2"],
}


@dataclass(frozen=True)
class Run:
    """The figures of one run."""

    real_tokens_per_s: list[float]
    """Real tokens/s of each step after the first ones; padding does not count."""
    losses: list[float]
    """The loss of each step."""
    peak_bytes: int
    """The peak resident set of the process."""


def main() -> None:
    """Run the variants in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("overrides", nargs="*", help="settings of the runs, such as train.batch_size=8")
    options = parser.parse_args()
    runs: dict[str, list[Run]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as directory:
        for index in range(options.rounds):
            for variant, (name, overrides) in enumerate(VARIANTS.items()):
                run_directory = Path(directory) / f"run{index}-{variant}"
                runs[name].append(train(run_directory, [*overrides, *options.overrides], options.steps))
    baseline = runs["without the line"]
    baseline_speed, baseline_peak = median_speed(baseline), statistics.median(run.peak_bytes for run in baseline)
    print(f"{options.rounds} rounds of {options.steps} steps in turns")
    print("| variant | real tokens/s | x | peak memory of a process, GiB | x | largest difference of a loss |")
    print("|---|---|---|---|---|---|")
    for name, runs_of_variant in runs.items():
        speed = median_speed(runs_of_variant)
        peak = statistics.median(run.peak_bytes for run in runs_of_variant)
        # numpy's max, unlike Python's, is NaN if one of the differences is.
        difference = np.max(np.abs(np.divide(runs_of_variant[0].losses, baseline[0].losses) - 1))
        print(
            f"| {name} | {speed:,.0f} | {speed / baseline_speed:.2f} | {peak / 2**30:.2f} | "
            f"{peak / baseline_peak:.2f} | {difference:.1e} |"
        )


def median_speed(runs: list[Run]) -> float:
    """Real tokens per second, the median over the steps of all runs."""
    return statistics.median(speed for run in runs for speed in run.real_tokens_per_s)


def train(directory: Path, overrides: list[str], steps: int) -> Run:
    """Run train_gpt.py as a user does, in a process of its own."""
    command = [
        sys.executable,
        "train_gpt.py",
        *overrides,
        f"run.directory={directory.parent}",
        f"run.name={directory.name}",
        f"train.steps={steps}",
        "data.eval_rows=16",
        f"log.eval_every_steps={steps}",
        "log.sample_tokens=0",
    ]
    with (directory.parent / f"{directory.name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit((directory.parent / f"{directory.name}.log").read_text())
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()][1:]
    return Run(
        real_tokens_per_s=[line["real_tokens_per_s"] for line in lines[WARM_UP_STEPS:]],
        losses=[line["loss"] for line in lines],
        peak_bytes=usage.ru_maxrss * 1024,
    )


if __name__ == "__main__":
    main()
