"""The growth of a step's time with the batch, the sequences and the model: the default GPT with the one line.

python benchmarks/growth.py [--rounds 2]

Each case is a run of its own of systems/loop.py, in turns. Times are medians over the steps after the first ones. Time
should be linear in label tokens, so a line is fitted to all steps of the cases that differ in batch size.
"""

import argparse
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compare_systems import SYSTEMS, WARM_UP_STEPS, run_system
from make_workloads import gpt

# isort: split
from workload import Workload, write_workload

STEPS = 12


@dataclass(frozen=True)
class Case:
    """The differences from the default GPT."""

    batch_size: int = 16
    """Sequences of a batch."""
    max_length: int = 512
    """Tokens of the longest sequence."""
    layers: int = 6
    """Layers of the model."""
    hidden: int = 256
    """Hidden size of the model."""


BATCHES = [Case(batch_size=batch_size) for batch_size in (4, 8, 16, 32)]
CASES = {
    "batch size": BATCHES,
    "sequence length": [Case(max_length=max_length) for max_length in (64, 128, 256, 512)],
    "layers": [Case(layers=layers) for layers in (3, 6, 12)],
    "hidden size": [Case(hidden=hidden) for hidden in (128, 256, 512)],
}


def main() -> None:
    """Print a table and the fitted line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    distinct = list(dict.fromkeys(case for cases in CASES.values() for case in cases))
    # Of each case, label tokens and seconds of its steps.
    steps: dict[Case, list[tuple[int, float]]] = {case: [] for case in distinct}
    with tempfile.TemporaryDirectory() as directory:
        default = gpt(Path(directory) / "gpt")
        works = {case: make_workload(default, Path(directory) / str(i), case) for i, case in enumerate(distinct)}
        for _ in range(rounds):
            for case, work in works.items():
                result = run_system(SYSTEMS["line"], work)
                steps[case] += list(zip(result["label_tokens"], result["seconds"], strict=True))[WARM_UP_STEPS:]
        parameters = {case: count_parameters(work) for case, work in works.items()}
    print(
        "| changed | batch size | longest sequence | layers | hidden size | parameters | label tokens/step | "
        "ms/step | µs/token |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for changed, cases in CASES.items():
        for case in cases:
            labels, seconds = (statistics.median(values) for values in zip(*steps[case], strict=True))
            print(
                f"| {changed} | {case.batch_size} | {case.max_length} | {case.layers} | {case.hidden} | "
                f"{parameters[case] / 1e6:.1f}M | {labels:,.0f} | {1e3 * seconds:,.0f} | "
                f"{1e6 * seconds / labels:,.0f} |"
            )
    labels, seconds = zip(*(step for case in BATCHES for step in steps[case]), strict=True)
    slope, intercept = statistics.linear_regression(labels, seconds)
    print(
        f"\nAll steps of the batch sizes: {1e3 * intercept:.0f} ms and {1e6 * slope:.0f} µs for each label token, "
        f"correlation {statistics.correlation(labels, seconds):.3f}"
    )


def make_workload(default: Workload, directory: Path, case: Case) -> Workload:
    """The default GPT's sequences that are short enough, as often as needed, and a model of the case's size."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    short_enough = [row for row in default.rows if len(row[0]) <= case.max_length]
    needed = STEPS * case.batch_size
    rows = (short_enough * (1 + needed // len(short_enough)))[:needed]
    config: Any = GPT2Config.from_pretrained(default.model)
    config.n_layer, config.n_embd, config.n_head = case.layers, case.hidden, case.hidden // 64
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(directory / "model")
    work = replace(
        default,
        directory=directory,
        batch_size=case.batch_size,
        max_length=case.max_length,
        steps=STEPS,
        rows=rows,
        held_out=rows[:1],
    )
    write_workload(work)
    return work


def count_parameters(work: Workload) -> int:
    """The number of the model's parameters, tied ones counted once."""
    from transformers import AutoModelForCausalLM

    return int(AutoModelForCausalLM.from_pretrained(work.model).num_parameters())


if __name__ == "__main__":
    main()
