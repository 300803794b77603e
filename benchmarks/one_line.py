"""What the one line gives on one machine: the same script, data and seed, without the line, with it, and on two workers.

python benchmarks/one_line.py [--rounds 3] [--steps 60]

The default GPT is trained in processes of their own that take turns. Speeds are medians over all steps but the first ones of
all rounds; memory is the most that a process had (its resident set, shared libraries included): two workers have it each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
STEPS_NOT_COUNTED = 10
VARIANTS = {
    "without the line": ["accelerator.advanced_parallelization=null"],
    "with it, float32": ["accelerator.advanced_parallelization.mixed_precision=false"],
    "with it": ["accelerator.advanced_parallelization.mixed_precision=true"],
    "with it, 2 workers": ["accelerator.advanced_parallelization.mixed_precision=true", "accelerator.workers=2"],
}


@dataclass(frozen=True)
class Run:
    """One run: seconds of each step but the first, the tokens of them that are no padding, losses, and the peak in bytes."""

    real_tokens_per_s: list[float]
    losses: list[float]
    peak_bytes: int
    seconds: float


def main() -> None:
    """Run the variants in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("overrides", nargs="*", help="settings of the runs, such as train.batch_size=8")
    options = parser.parse_args()
    runs: dict[str, list[Run]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as directory:
        for number in range(options.rounds):
            for place, (name, overrides) in enumerate(VARIANTS.items()):
                runs[name].append(
                    train(Path(directory) / f"run{number}-{place}", [*overrides, *options.overrides], options.steps)
                )
    first = runs["without the line"]
    speed = {name: statistics.median(s for run in of for s in run.real_tokens_per_s) for name, of in runs.items()}
    print(f"{options.rounds} rounds of {options.steps} steps in turns")
    print("| variant | real tokens/s | x | peak memory of a process, GiB | x | largest difference of a loss |")
    print("|---|---|---|---|---|---|")
    for name, of in runs.items():
        peak, peak_first = (statistics.median(run.peak_bytes for run in these) for these in (of, first))
        apart = max(abs(a / b - 1) for a, b in zip(of[0].losses, first[0].losses, strict=True))
        print(
            f"| {name} | {speed[name]:,.0f} | {speed[name] / speed['without the line']:.2f} | {peak / 2**30:.2f} | "
            f"{peak / peak_first:.2f} | {apart:.1e} |"
        )


def train(directory: Path, overrides: list[str], steps: int) -> Run:
    """Train as a user does, in a process of its own."""
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
    start = time.perf_counter()
    with (directory.parent / f"{directory.name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit((directory.parent / f"{directory.name}.log").read_text())
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()][1:]
    return Run(
        [line["real_tokens_per_s"] for line in lines[STEPS_NOT_COUNTED:]],
        [line["loss"] for line in lines],
        usage.ru_maxrss * 1024,
        time.perf_counter() - start,
    )


if __name__ == "__main__":
    main()
