"""Train LoRA adapters of a pretrained model under plans of each kind, and compare them with one worker and with PEFT.

    python -m tests.verify.lora models/smollm2-135m [--steps 20] [--plain] [--floor]

Each run is `train_llama3_70b.py` with configs/llama_smollm2_lora.yaml in float32. Compared are

- the loss of each step and the adapter's weights, under each plan, with those of one worker,
- the logits of the merged model (scripts/export.py --merge) with those of the base and the adapter in plain PEFT.

With --plain, a run without the line is the reference: the padded loop of transformers and PEFT. With --floor, that loop
is compared with itself on a CPU without AVX-512, which shows how much the rounding of float32 is worth.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import ROOT
from tests.helpers.compare import max_difference, worst
from tests.runtime.engine.test_multi_worker_runs import WITH_PLAN
from utils.training.lora import WEIGHTS_FILE

TOLERANCE = 1e-5
CONFIG = "configs/llama_smollm2_lora.yaml"
SETTINGS = (
    "data.summaries=[networkx]",
    "data.eval_rows=8",
    "log.eval_every_steps=null",
    "log.sample_tokens=0",
    "log.report=false",
    "checkpoint.every_minutes=null",
)
FLOAT32 = "{mixed_precision: false}"
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
RUN_SCRIPT = """
import runpy, sys
sys.argv[0] = "train_llama3_70b.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def main():
    """Print the differences of each plan; the exit code is 1 if any is above the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the directory of a pretrained model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--plain", action="store_true", help="compare with the loop without the line, which is slow")
    parser.add_argument("--floor", action="store_true", help="only compare the plain loop with itself under AVX2")
    options = parser.parse_args()
    model = options.model.resolve()
    with tempfile.TemporaryDirectory(prefix="lora-") as directory:
        if options.floor:
            return floor(model, options.steps, Path(directory))
        return compare(model, options.steps, Path(directory), is_plain=options.plain)


def compare(model, steps, directory, *, is_plain):
    """Run all plans in a directory; returns the exit code."""
    reference = train(model, steps, directory, "reference", None if is_plain else "", 1)
    losses = losses_of(reference)
    adapter = load_file(reference / "model" / WEIGHTS_FILE)
    print(f"{'without the line' if is_plain else '1 worker'}: losses {losses[0]:.6f} ... {losses[-1]:.6f}", flush=True)
    failed = 0
    for workers, plan in ([(1, "")] if is_plain else []) + plans_of(model):
        run = train(model, steps, directory, plan.replace(" ", "-") or "line", plan, workers)
        differences = [abs(loss - other) for loss, other in zip(losses_of(run), losses, strict=True)]
        weights = load_file(run / "model" / WEIGHTS_FILE)
        assert weights.keys() == adapter.keys()
        of_weights = worst(max_difference(weights[name], adapter[name]) for name in adapter)
        failed += not worst(differences) < TOLERANCE
        print(f"{plan or '1 worker':14} {workers} workers: losses {worst(differences):.1e}, adapter {of_weights:.1e}")
        sys.stdout.flush()
    difference = merged_difference(model, reference, directory / "merged")
    print(f"merged and plain PEFT: logits {difference:.1e} of the largest")
    failed += not difference < TOLERANCE
    print(f"{failed} failed")
    return 1 if failed else 0


def floor(model, steps, directory):
    """Print the difference of two runs without the line, with different CPU instructions; returns the exit code."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        sys.exit("this CPU has no AVX-512, so AVX2 makes no difference: run --floor on one that has it")
    losses = losses_of(train(model, steps, directory, "avx512", None, 1))
    others = losses_of(train(model, steps, directory, "avx2", None, 1, AVX2))
    differences = [abs(loss - other) for loss, other in zip(losses, others, strict=True)]
    print(f"without the line, AVX-512 and AVX2: losses {worst(differences):.1e}")
    return 0


def plans_of(model):
    """Numbers of workers and plans. Tensor parallelism divides the heads of the model."""
    config = AutoConfig.from_pretrained(model)
    common = math.gcd(config.num_attention_heads, config.num_key_value_heads)
    tensor = next(size for size in range(2, common + 1) if common % size == 0)
    return [
        (2, "dp2 mb4x1"),
        (2, "pp2 mb4x2"),
        (4, "pp2 dp2 mb2x2"),
        (2 * tensor, f"tp{tensor} pp2 mb4x2"),
        (2 * tensor, f"tp{tensor} dp2 mb4x1"),
    ]


def train(model, steps, directory, name, plan, workers, variables=None):
    """Train adapters, with further environment variables; returns the directory of the run.

    A plan of None is without the line, "" is the planner's.
    """
    script = directory / "run.py"
    script.write_text((WITH_PLAN.replace("PLAN", repr(plan)) if plan else "") + RUN_SCRIPT)
    line = "null" if plan is None else FLOAT32
    overrides = [f"model.pretrained={model}", f"train.steps={steps}", f"run.directory={directory}", f"run.name={name}"]
    overrides += [f"accelerator.workers={workers}", f"accelerator.advanced_parallelization={line}", *SETTINGS]
    state = {"MOREH_STATE_DIR": str(directory / "state")}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **state, **(variables or {})}
    environment.setdefault("GOMP_SPINCOUNT", "1000")
    command = [sys.executable, str(script), "--config", CONFIG, *overrides]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if finished.returncode != 0:
        sys.exit(f"{name}:\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}")
    if plan:
        console = " ".join((finished.stdout + finished.stderr).split())
        carried_out = re.search(rf"{workers} workers run the plan '(.+?)'", console)
        assert carried_out is not None, console[-2000:]
        assert set(plan.split()) <= set(carried_out[1].split()), carried_out[1]
    return directory / name


def losses_of(run):
    """The losses of a run, one for each step."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


@torch.no_grad()
def merged_difference(model, run, target):
    """The largest difference of the merged model's logits from those of plain PEFT, relative to the largest logit."""
    command = [sys.executable, "scripts/export.py", str(run), str(target), "--merge"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = torch.arange(300, 428).view(2, 64)
    without = base(input_ids=ids).logits
    expected = PeftModel.from_pretrained(base, run / "model").eval()(input_ids=ids).logits
    merged = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()(input_ids=ids).logits
    assert (expected - without).abs().max() > 0.1, "the adapter does nothing"
    return ((merged - expected).abs().max() / expected.abs().max()).item()


if __name__ == "__main__":
    sys.exit(main())
