"""How the time of a step grows with the batch, the length of the rows and the model: the default GPT with the line.

python benchmarks/growth.py [--rounds 2]

Each case is a run of its own of systems/loop.py, in turns. Times are medians over its steps but the first ones; a line is
fitted to all steps of the batches, since time should be linear in label tokens.
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
    """What differs from the default: rows of a batch, tokens of the longest row, layers, and hidden size."""

    rows: int = 16
    longest: int = 512
    layers: int = 6
    hidden: int = 256


BATCHES = [Case(rows=rows) for rows in (4, 8, 16, 32)]
CASES = {
    "batch": BATCHES,
    "row length": [Case(longest=longest) for longest in (64, 128, 256, 512)],
    "layers": [Case(layers=layers) for layers in (3, 6, 12)],
    "hidden size": [Case(hidden=hidden) for hidden in (128, 256, 512)],
}


def main() -> None:
    """Print a table and the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    different = list(dict.fromkeys(case for cases in CASES.values() for case in cases))
    steps: dict[Case, list[tuple[int, float]]] = {case: [] for case in different}
    with tempfile.TemporaryDirectory() as directory:
        whole = gpt(Path(directory) / "gpt")
        works = {case: workload(whole, Path(directory) / str(number), case) for number, case in enumerate(different)}
        for _ in range(rounds):
            for case, work in works.items():
                found = run_system(SYSTEMS["line"], work)
                steps[case] += list(zip(found["label_tokens"], found["seconds"], strict=True))[WARM_UP_STEPS:]
        parameters = {case: parameters_of(work) for case, work in works.items()}
    print(
        "| changed | rows | longest row | layers | hidden size | parameters | label tokens a step | ms a step | µs a token |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for changed, cases in CASES.items():
        for case in cases:
            labels, seconds = (statistics.median(values) for values in zip(*steps[case], strict=True))
            print(
                f"| {changed} | {case.rows} | {case.longest} | {case.layers} | {case.hidden} | {parameters[case] / 1e6:.1f}M | "
                f"{labels:,.0f} | {1e3 * seconds:,.0f} | {1e6 * seconds / labels:,.0f} |"
            )
    labels, seconds = zip(*(step for case in BATCHES for step in steps[case]), strict=True)
    slope, start = statistics.linear_regression(labels, seconds)
    print(f"\nAll steps of the batches: {1e3 * start:.0f} ms and {1e6 * slope:.0f} µs for each label token, ", end="")
    print(f"correlation {statistics.correlation(labels, seconds):.3f}")


def workload(whole: Workload, directory: Path, case: Case) -> Workload:
    """The rows of the default GPT that are not too long, again and again, and a model of the case's size."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    fitting = [row for row in whole.rows if len(row[0]) <= case.longest]
    rows = (fitting * (1 + STEPS * case.rows // len(fitting)))[: STEPS * case.rows]
    config: Any = GPT2Config.from_pretrained(whole.model)
    config.n_layer, config.n_embd, config.n_head = case.layers, case.hidden, case.hidden // 64
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(directory / "model")
    made = replace(
        whole,
        directory=directory,
        batch_size=case.rows,
        max_length=case.longest,
        steps=STEPS,
        rows=rows,
        held_out=rows[:1],
    )
    write_workload(made)
    return made


def parameters_of(work: Workload) -> int:
    """The model's parameters, tied ones once."""
    from transformers import AutoModelForCausalLM

    return int(AutoModelForCausalLM.from_pretrained(work.model).num_parameters())


if __name__ == "__main__":
    main()
