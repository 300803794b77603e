"""This project beside what else could be installed: the same rows, model, batches and steps, each system in turns.

python benchmarks/compare_systems.py WORKLOAD... [--rounds 2] [--ablation] [--systems loop line ...]

WORKLOAD is gpt (the default GPT on padded docstring pairs), smollm2 (SmolLM2-135M-Instruct on body -> summary pairs; `make
smollm2` first) or llama (a matrix-dominated Llama on rows without padding). Each run is a process of its own; figures are
medians over the rounds, of all steps but the first ones.
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

from workload import Workload, label_count, write_workload  # noqa: E402

from moreh.options import OPTIMIZATIONS  # noqa: E402

ENVIRONMENTS = ROOT / "build" / "systems"
STEPS_NOT_COUNTED = 3
HELD_OUT = 64
# What an ablation switches off one by one.
ABLATED = [*OPTIMIZATIONS, "mixed_precision"]


@dataclass(frozen=True)
class System:
    """What is compared: a script of `systems/` with its arguments, in this environment or in one of `make bench`.

    `tuned`: with settings that one must know to make it fast.
    """

    name: str
    command: tuple[str, ...]
    environment: str | None = None
    tuned: bool = False

    @property
    def python(self) -> str:
        """The interpreter that runs it."""
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
# The line again before every third of its options: all are compared with it, and the machine's speed drifts.
ABLATION = [
    name for place, option in enumerate(ABLATED) for name in (["line"] if place % 3 == 0 else []) + [f"no-{option}"]
]
# What is no part of the line comes from elsewhere.
OTHERS = ["trainer", "trainer-tuned", "trainer-grouped", "trainer-compiled", "trainer-grouped-compiled", "trl"]
LLAMA_ONLY = ["litgpt", "litgpt-tuned", "torchtune", "torchtune-bfloat16", "torchtune-compiled"]


def main() -> None:
    """Run the comparison and print a table for each workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="instead of the workload's own number")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, help="instead of all that know the model")
    parser.add_argument(
        "--ablation", action="store_true", help="the line with each of its options off, instead of systems"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        for name in options.workloads:
            work = WORKLOADS[name](Path(directory) / name)
            if options.steps is not None:
                work = replace(work, steps=options.steps)
            write_workload(work)
            systems = [*OTHERS, *(LLAMA_ONLY if name != "gpt" else [])]
            names = options.systems or (ABLATION if options.ablation else ["loop", "line", *systems])
            compare(work, names, options.rounds)


def compare(work: Workload, names: list[str], rounds: int) -> None:
    """Run the systems in turns and print a table, with the first one as 1. One that is named twice runs twice in a round."""
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    products = []
    for number in range(rounds):
        # Every second round backwards, so that none always runs after the same one.
        for name in names if number % 2 == 0 else reversed(names):
            print(f"{work.name}, round {number + 1} of {rounds}: {SYSTEMS[name].name}", file=sys.stderr, flush=True)
            products.append(matrix_rate())
            records[name].append(run(SYSTEMS[name], work))
    of_rate = statistics.median(products) * sum(label_count([row]) for row in work.rows) / model_flops(work)
    print(f"\n{work.name}: {work.steps} steps of {work.batch_size} rows, {rounds} rounds in turns; ", end="")
    print(f"{statistics.median(products) / 1e9:.0f} GFLOP/s in large products of bfloat16")
    print(
        "| system | label tokens/s | x | of that rate | peak memory, GiB | first step, s | last losses | held-out loss |"
    )
    print("|---|---|---|---|---|---|---|---|")
    rates = {name: statistics.median(label_tokens_per_s(one) for one in found) for name, found in records.items()}
    first = rates[names[0]]
    for name, found in records.items():
        rate = rates[name]
        print(
            f"| {SYSTEMS[name].name} | {rate:,.{0 if rate >= 100 else 1}f} | {rate / first:.2f} | {rate / of_rate:.0%} | "
            f"{statistics.median(r['peak_bytes'] for r in found) / 2**30:.2f} | "
            f"{statistics.median(r['first_step_s'] for r in found):.1f} | "
            f"{statistics.mean(found[0]['losses'][-5:]):.4f} | {found[0]['held_out_loss']:.4f} |",
            flush=True,
        )
    print(f"\n{beside_the_fastest(rates)}", flush=True)


def beside_the_fastest(rates: dict[str, float]) -> str:
    """How the line compares with the fastest other systems, given the label tokens per second of each; empty without others."""
    said = []
    for tuned in (False, True):
        others = {name: rate for name, rate in rates.items() if name not in LOOPS and SYSTEMS[name].tuned == tuned}
        if "line" in rates and others:
            fastest = max(others, key=others.__getitem__)
            kind = "tuned" if tuned else "default"
            said.append(
                f"{rates['line'] / others[fastest]:.2f} x the fastest with {kind} settings ({SYSTEMS[fastest].name})"
            )
    return f"The loop with the line: {', '.join(said)}." if said else ""


def label_tokens_per_s(record: dict[str, Any]) -> float:
    """Over all steps but the first ones."""
    counted, seconds = record["label_tokens"][STEPS_NOT_COUNTED:], record["seconds"][STEPS_NOT_COUNTED:]
    return float(sum(counted) / sum(seconds))


def matrix_rate() -> float:
    """FLOP/s of a large product of bfloat16 matrices, the median of a few."""
    import torch

    left, right = torch.randn(2, 2048, 2048).bfloat16()
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return float(2 * 2048**3 / statistics.median(seconds))


def model_flops(work: Workload) -> float:
    """FLOP that training on the workload's rows takes, without padding and with the output layer only at labels.

    6 for each weight and token (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361), and for attention's two products 6 for
    each channel and pair of tokens, of which a causal model has half.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work.model)
    inside = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and re.search(r"\.\d+\.", name))
    output = model.get_output_embeddings().weight.numel()
    width = model.config.num_attention_heads * getattr(model.config, "head_dim", 0) or model.config.hidden_size
    lengths = [len(ids) for ids, _ in work.rows]
    attention = 6 * model.config.num_hidden_layers * width * sum(length**2 for length in lengths)
    labels = sum(label_count([row]) for row in work.rows)
    return float(6 * inside * sum(lengths) + 6 * output * labels + attention)


def run(system: System, work: Workload) -> dict[str, Any]:
    """One run of a system; what it has recorded."""
    record = work.directory / "record.json"
    script, *arguments = system.command
    command = [system.python, str(SYSTEMS_DIRECTORY / script), str(work.directory), *arguments]
    environment = {**os.environ, "BENCHMARK_STARTED": str(time.time()), "BENCHMARK_RECORD": str(record)}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    if finished.returncode != 0:
        sys.exit(f"{system.name}:\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(record.read_text())
    return found


def gpt(directory: Path) -> Workload:
    """The default GPT and its data, as configs/gpt.yaml says."""
    work = _from_config(directory, "configs/gpt.yaml", [], "default GPT, docstring pairs", steps=40)
    # There is no warm-up here: with the whole rate of the configuration curves part at the first rounding.
    return replace(work, lr=work.lr / 4)


def smollm2(directory: Path) -> Workload:
    """SmolLM2-135M-Instruct and its data, as configs/llama_smollm2.yaml says."""
    return _from_config(directory, "configs/llama_smollm2.yaml", [], "SmolLM2-135M, summaries", steps=8)


def llama(directory: Path) -> Workload:
    """A Llama of hidden size 1,024 with 8 layers, on rows of 512 random tokens: no padding, every token a label."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=8192,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(directory / "model")
    steps, batch_size, length = 8, 4, 512
    rows = [(row, 0) for row in torch.randint(0, 8192, (steps * batch_size + 4, length)).tolist()]
    return Workload(
        directory, "Llama 1,024 x 8, no padding", batch_size, length, steps, 1e-4, 0.1, 0, rows[:-4], rows[-4:]
    )


def _from_config(directory: Path, path: str, overrides: list[str], name: str, steps: int) -> Workload:
    import torch

    import train_gpt
    from utils.config.yaml_file import load_config
    from utils.data.batches import ShuffledBatches
    from utils.data.dataset import prepare_data
    from utils.training.model import load_model

    os.chdir(ROOT)
    config = load_config(path, overrides)
    torch.manual_seed(config.train.seed)
    data = prepare_data(config, train_gpt.make_pair, train_gpt.make_example, lambda line: None)
    load_model(config, data.tokenizer).save_pretrained(directory / "model")
    order = [
        row for batch in ShuffledBatches(len(data.train), config.train.batch_size, config.train.seed) for row in batch
    ][: steps * config.train.batch_size]
    rows, held_out = (
        [(part[i]["input_ids"], part[i]["prompt_length"]) for i in numbers]
        for part, numbers in ((data.train, order), (data.evaluation, range(min(HELD_OUT, len(data.evaluation)))))
    )
    return Workload(
        directory,
        name,
        config.train.batch_size,
        config.data.max_length,
        steps,
        config.train.lr,
        config.train.weight_decay,
        data.tokenizer.pad_token_id,
        rows,
        held_out,
    )


WORKLOADS = {"gpt": gpt, "smollm2": smollm2, "llama": llama}

if __name__ == "__main__":
    main()
