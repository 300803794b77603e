"""Compare this project with other systems on the same rows, model, batches and steps.

python benchmarks/compare_systems.py WORKLOAD... [--rounds 2] [--ablation] [--systems loop line ...]

The workloads are

- gpt: the default GPT on padded docstring pairs
- smollm2: SmolLM2-135M-Instruct on text -> summary pairs (`make smollm2` first)
- smollm2-lora: LoRA adapters of the same model, without and with the line, and in the Trainer with PEFT
- llama: a Llama dominated by matmuls, on rows without padding

The systems take turns, each run in a process of its own. Figures are medians over the rounds, without the first steps.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SYSTEMS_DIRECTORY = Path(__file__).parent / "systems"
sys.path[:0] = [str(ROOT), str(SYSTEMS_DIRECTORY)]

from make_workloads import WORKLOADS  # noqa: E402
from workload import Workload, count_labels, write_workload  # noqa: E402

from moreh.options import OPTIMIZATIONS  # noqa: E402

ENVIRONMENTS = ROOT / "build" / "systems"
# Steps at the beginning of a run that do not count.
WARM_UP_STEPS = 3
# What an ablation switches off, one at a time.
ABLATED = [*OPTIMIZATIONS, "mixed_precision"]


@dataclass(frozen=True)
class System:
    """A system that is compared."""

    name: str
    """The system's name in the tables."""
    command: tuple[str, ...]
    """A script of `systems/` with its arguments."""
    environment: str | None = None
    """The environment of `make bench` that it runs in; None: this one."""
    tuned: bool = False
    """True if the system is fast only with settings that a user must know."""

    @property
    def python(self) -> str:
        """The interpreter of its environment."""
        return sys.executable if self.environment is None else str(ENVIRONMENTS / self.environment / "bin" / "python")


SYSTEMS = {
    "loop": System("the loop, padded", ("loop.py",)),
    "line": System("the loop with the line", ("loop.py", "--line")),
    **{f"no-{option}": System(f"... without {option}", ("loop.py", "--line", "--off", option)) for option in ABLATED},
    "trainer": System("Trainer, defaults", ("trainer.py",)),
    "trainer-tuned": System("Trainer, bfloat16, fused", ("trainer.py", "--tuned"), tuned=True),
    "trainer-grouped": System("Trainer, bfloat16, fused, by length", ("trainer.py", "--tuned", "--group"), tuned=True),
    "trainer-compiled": System(
        "Trainer, bfloat16, fused, compiled", ("trainer.py", "--tuned", "--compile"), tuned=True
    ),
    "trainer-grouped-compiled": System(
        "Trainer, bfloat16, fused, by length, compiled", ("trainer.py", "--tuned", "--group", "--compile"), tuned=True
    ),
    "trl": System("TRL, packed, bfloat16, fused", ("trl_packed.py",), "trl", tuned=True),
    "litgpt": System("LitGPT, defaults", ("litgpt_full.py",), "litgpt"),
    "litgpt-tuned": System("LitGPT, bfloat16, fused", ("litgpt_full.py", "--tuned"), "litgpt", tuned=True),
    "torchtune": System("torchtune, float32", ("torchtune_full.py",), "torchtune"),
    "torchtune-bfloat16": System(
        "torchtune, all in bfloat16", ("torchtune_full.py", "--bfloat16"), "torchtune", tuned=True
    ),
    "torchtune-compiled": System("torchtune, compiled", ("torchtune_full.py", "--compile"), "torchtune", tuned=True),
}
LOOPS = ["loop", "line", *(f"no-{option}" for option in ABLATED)]
# The line runs again before every third option, because all are compared with it and the machine's speed drifts.
ABLATION = [
    name for index, option in enumerate(ABLATED) for name in (["line"] if index % 3 == 0 else []) + [f"no-{option}"]
]
OTHERS = ["trainer", "trainer-tuned", "trainer-grouped", "trainer-compiled", "trainer-grouped-compiled", "trl"]
# Those that can train adapters here.
WITH_ADAPTERS = OTHERS[:-1]
# The workloads that the systems of LLAMA_ONLY know.
IN_ALL = ["smollm2", "llama"]
LLAMA_ONLY = ["litgpt", "litgpt-tuned", "torchtune", "torchtune-bfloat16", "torchtune-compiled"]


def main() -> None:
    """Run the comparison and print a table for each workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="default: the workload's own number")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, help="default: all that know the model")
    parser.add_argument(
        "--ablation", action="store_true", help="compare the line with itself, one option switched off at a time"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        for name in options.workloads:
            workload = WORKLOADS[name](Path(directory) / name)
            if options.steps is not None:
                workload = replace(workload, steps=options.steps)
            write_workload(workload)
            others = [*(OTHERS if not workload.lora_rank else WITH_ADAPTERS), *(LLAMA_ONLY if name in IN_ALL else [])]
            names = options.systems or (ABLATION if options.ablation else ["loop", "line", *others])
            compare(workload, names, options.rounds)


def compare(workload: Workload, names: list[str], rounds: int) -> None:
    """Run the systems in turns and print a table of speeds relative to the first one.

    A system that is named twice runs twice in a round.
    """
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    matmul_rates = []
    for index in range(rounds):
        # Every second round is in reverse order, so that no system always runs after the same one.
        for name in names if index % 2 == 0 else reversed(names):
            print(f"{workload.name}, round {index + 1} of {rounds}: {SYSTEMS[name].name}", file=sys.stderr, flush=True)
            matmul_rates.append(matmul_flops_per_s())
            records[name].append(run_system(SYSTEMS[name], workload))
    matmul_rate = statistics.median(matmul_rates)
    # Label tokens per second if the model's matmuls ran at the rate of large ones.
    attainable = matmul_rate * count_labels(workload.rows) / model_flops(workload)
    print(
        f"\n{workload.name}: {workload.steps} steps of {workload.batch_size} rows, {rounds} rounds in turns; ", end=""
    )
    print(f"{matmul_rate / 1e9:.0f} GFLOP/s in large bfloat16 matmuls")
    columns = (
        "label tokens/s",
        "x",
        "of that rate",
        "peak memory, GiB",
        "first step, s",
        "last losses",
        "held-out loss",
    )
    print(f"| system | {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|---|---|")
    rates = {name: statistics.median(map(label_tokens_per_s, runs)) for name, runs in records.items()}
    first_rate = rates[names[0]]
    for name, runs in records.items():
        rate = rates[name]
        print(
            f"| {SYSTEMS[name].name} | {rate:,.{0 if rate >= 100 else 1}f} | {rate / first_rate:.2f} | "
            f"{rate / attainable:.0%} | "
            f"{statistics.median(record['peak_bytes'] for record in runs) / 2**30:.2f} | "
            f"{statistics.median(record['first_step_s'] for record in runs):.1f} | "
            f"{statistics.mean(runs[0]['losses'][-5:]):.4f} | {runs[0]['held_out_loss']:.4f} |",
            flush=True,
        )
    print(f"\n{compared_with_the_fastest(rates)}", flush=True)


def compared_with_the_fastest(rates: dict[str, float]) -> str:
    """A comparison of the line with the fastest other systems, in label tokens per second; empty without others."""
    comparisons = []
    for tuned in (False, True):
        others = {name: rate for name, rate in rates.items() if name not in LOOPS and SYSTEMS[name].tuned == tuned}
        if "line" in rates and others:
            fastest = max(others, key=others.__getitem__)
            kind = "tuned" if tuned else "default"
            comparisons.append(
                f"{rates['line'] / others[fastest]:.2f} x the fastest with {kind} settings ({SYSTEMS[fastest].name})"
            )
    return f"The loop with the line: {', '.join(comparisons)}." if comparisons else ""


def label_tokens_per_s(record: dict[str, Any]) -> float:
    """The speed of a run, without its first steps."""
    label_tokens, seconds = record["label_tokens"][WARM_UP_STEPS:], record["seconds"][WARM_UP_STEPS:]
    return float(sum(label_tokens) / sum(seconds))


def matmul_flops_per_s() -> float:
    """FLOP/s of a large bfloat16 matmul, the median of a few."""
    import torch

    left, right = torch.randn(2, 2048, 2048).bfloat16()
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return float(2 * 2048**3 / statistics.median(seconds))


def model_flops(workload: Workload) -> float:
    """The FLOP of training on the workload's rows, without padding and with the output layer only at labels.

    Each weight takes 6 FLOP a token (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361), and 4 where it is frozen;
    adapters are not counted. Each of attention's two
    matmuls takes 6 for each channel and pair of tokens; a causal model computes half of the pairs.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(workload.model)
    in_layers = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and re.search(r"\.\d+\.", name))
    output_layer = model.get_output_embeddings().weight.numel()
    channels = model.config.num_attention_heads * getattr(model.config, "head_dim", 0) or model.config.hidden_size
    seq_lens = [len(ids) for ids, _ in workload.rows]
    attention = 6 * model.config.num_hidden_layers * channels * sum(length**2 for length in seq_lens)
    per_weight = 4 if workload.lora_rank else 6
    in_matrices = in_layers * sum(seq_lens) + output_layer * count_labels(workload.rows)
    return float(per_weight * in_matrices + attention)


def run_system(system: System, workload: Workload) -> dict[str, Any]:
    """Run a system on a workload; returns its `workload.Record` as a dictionary."""
    path = workload.directory / "record.json"
    script, *arguments = system.command
    command = [system.python, str(SYSTEMS_DIRECTORY / script), str(workload.directory), *arguments]
    environment = {**os.environ, "BENCHMARK_STARTED": str(time.time()), "BENCHMARK_RECORD": str(path)}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    if finished.returncode != 0:
        sys.exit(f"{system.name}:\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}")
    record: dict[str, Any] = json.loads(path.read_text())
    return record


if __name__ == "__main__":
    main()
