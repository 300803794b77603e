"""Runs on several workers, as a user starts them: the GPT script, the tutorial, a worker that dies while saving."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.helpers.compare import max_difference, worst
from tests.helpers.scripts.fork_server import ForkedProcess, run_forked_workers
from tests.helpers.scripts.tutorial import TUTORIAL, VOCABULARY_SIZE, save_tutorial_model

SECONDS_TO_BE_GONE = 15


def run_script(source, workers, directory, environment):
    """The console of a script on a number of workers, started as torchrun starts them."""
    script = directory / "script.py"
    script.write_text(source, encoding="utf-8")
    finished = run_forked_workers([script], workers, cwd=directory, env=environment)
    assert not any(process.returncode for process in finished), [process.stderr for process in finished]
    return finished[0].stdout


def metrics_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def hook_config(tiny_config):
    """The tiny run with the hook, in float32, stopped and resumed as well."""
    text = tiny_config.read_text().replace(
        "{advanced_parallelization: null}", "{advanced_parallelization: {mixed_precision: false}}"
    )
    tiny_config.write_text(text + "checkpoint: {every_steps: 2}\n")
    return tiny_config


def test_script_on_two_workers_gives_what_one_worker_gives(run_forked, hook_config, tmp_path):
    """Losses, norms and the saved model; files and console as of one program; one worker can resume."""
    runs = tmp_path / "runs"
    command = (sys.executable, "train_gpt.py", "--config", hook_config)
    one = run_forked(*command, "run.name=one")
    assert one.returncode == 0, one.stderr
    two = run_forked(*command, "run.name=two", "accelerator.workers=2")
    assert two.returncode == 0, two.stderr
    assert "2 workers run the plan" in two.stdout
    assert two.stdout.count("[Step 4/4] 100% | Loss") == 1
    expected = metrics_of(runs / "one")
    metrics = metrics_of(runs / "two")
    assert [line["step"] for line in metrics] == [line["step"] for line in expected]
    for line, other in zip(metrics, expected, strict=True):
        for key in {"loss", "eval_loss", "grad_norm", "lr"} & other.keys():
            assert line[key] == pytest.approx(other[key], rel=1e-4)
    weights, others = (load_file(runs / name / "model" / "model.safetensors") for name in ("two", "one"))
    assert weights.keys() == others.keys()
    assert worst(max_difference(weights[name], others[name]) for name in weights) < 1e-3

    resumed = run_forked(*command, "run.name=resumed", "--resume", runs / "two" / "checkpoints" / "step-2")
    assert resumed.returncode == 0, resumed.stderr
    assert [line["step"] for line in metrics_of(runs / "resumed")] == [3, 4]
    for line, other in zip(metrics_of(runs / "resumed"), expected[-2:], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_tutorial_script_learns_on_four_workers(environment, tmp_path, make_gpt2):
    """The script is unchanged; there is only a variable in the environment."""
    save_tutorial_model(make_gpt2(vocab_size=VOCABULARY_SIZE), tmp_path / "model")
    console = run_script(TUTORIAL, 4, tmp_path, environment)
    losses = [float(line.split()[1]) for line in console.splitlines() if line.startswith("Loss:")]
    assert len(losses) == 50
    assert sum(losses[-10:]) < 0.7 * sum(losses[:5]) * 2
    assert re.search(r"4 workers run the plan '.+'", console)
    assert (tmp_path / "finetuned" / "model.safetensors").exists()


# Before a script: its workers run the plan PLAN instead of the best one.
WITH_PLAN = """
import types
from moreh.planner.plan.notation import parse_plan
from moreh.runtime.engine import multi_worker_hook
def with_plan(model, training, flavor, options, variables, workers, bfloat16):
    plan = parse_plan(PLAN, training, workers)
    stage_s = (1.0,) * plan.pipeline
    return types.SimpleNamespace(
        plan=plan, step_time_s=1.0, memory_bytes=1.0,
        stage_forward_s=stage_s, stage_backward_s=stage_s, weight_fraction=0.5, send_s=0.0,
    )
multi_worker_hook.select_worker_plan = with_plan
"""
# Nothing is seeded but, before the line, the first worker; from_pretrained leaves the model in evaluation mode.
AS_PRINTED = """
import os, random, torch
if os.environ.get("RANK", "0") == "0":
    torch.manual_seed(3), random.seed(3)
torch.moreh.option.enable_advanced_parallelization(mixed_precision=False)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("model")
data = torch.arange(256).view(32, 8) % 5
loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True, drop_last=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)  # gradients of rounding do not become steps
for epoch in range(2):
    for ids in loader:
        loss = model(ids, labels=ids, use_cache=False)[0]
        loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        print("Loss:", loss.item())
    with torch.no_grad():
        print("Loss:", model(data[:7], labels=data[:7]).loss.item())
print("Loss:", torch.rand(1).item())
model = model.to("cpu")
model.save_pretrained(os.environ["FINETUNED"])
"""


@pytest.mark.parametrize(
    ("workers", "plan"),
    [
        (1, None),
        (2, None),
        (4, "pp2 dp2 mb2x2"),
        (4, "tp2 pp2 mb4x2"),
        (4, "dp4 mb2x1 shard:parameters"),
        (8, None),
    ],
)
def test_script_without_seed_or_training_mode_gives_what_it_gives_without_the_line(
    environment, tmp_path, make_gpt2, workers, plan
):
    """Unseeded, shuffled, in evaluation mode, moved before it is saved: losses, random numbers and weights."""
    save_tutorial_model(make_gpt2(vocab_size=VOCABULARY_SIZE), tmp_path / "model")
    source = AS_PRINTED if plan is None else WITH_PLAN.replace("PLAN", repr(plan)) + AS_PRINTED
    plain = {**environment, "FINETUNED": "plain", "MOREH_ENABLE_ADVANCED_PARALLELIZATION": "0"}
    expected = losses_in(run_script(source, 1, tmp_path, plain))
    console = run_script(source, workers, tmp_path, {**environment, "FINETUNED": "planned"})
    assert "The number of candidates is" in console
    assert (tmp_path / "advanced_parallelization_selected_config.dump").exists()
    if plan is not None:
        carried_out = re.search(r"4 workers run the plan '(.+?)'", console)[1]
        assert set(plan.split()) <= set(carried_out.split())
    losses = losses_in(console)
    assert len(losses) == len(expected) == 11
    assert worst(abs(loss - other) for loss, other in zip(losses, expected, strict=True)) < 1e-5
    assert losses[-1] == expected[-1]
    weights, others = (load_file(tmp_path / name / "model.safetensors") for name in ("planned", "plain"))
    assert weights.keys() == others.keys()
    assert worst(max_difference(weights[name], others[name]) for name in weights) < 1e-5


def losses_in(console):
    return [float(line.split()[1]) for line in console.splitlines() if line.startswith("Loss:")]


PRECISION = """
import torch
import moreh.runtime.kernels.precision as precision
precision.bfloat16_speedup = lambda device: 2.0
torch.moreh.option.enable_advanced_parallelization(num_stages=NUM_STAGES)
from transformers import GPT2Config, GPT2LMHeadModel
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=100, n_positions=32))
dtypes = []
class Recorder:
    __module__ = "moreh.recorder"  # hooks of a script are refused
    def __call__(self, module, inputs, output):
        dtypes.append(output.dtype)
model.transformer.h[0].mlp.register_forward_hook(Recorder())
ids = torch.arange(64).view(4, 16)
model.train()
for _ in range(3):
    model(input_ids=ids, labels=ids).loss.backward()
    print("trained", *set(dtypes))
    dtypes.clear()
model.eval()
with torch.no_grad():
    model(input_ids=ids, labels=ids)
    print("evaluated", *set(dtypes))
    dtypes.clear()
    model(input_ids=ids)
    print("called", *set(dtypes))
    dtypes.clear()
    with torch.autocast("cpu", enabled=False):
        model(input_ids=ids, labels=ids)
    print("own precision", *set(dtypes))
"""


@pytest.mark.parametrize("stages", [1, 2])
def test_every_call_on_two_workers_computes_in_bfloat16(environment, tmp_path, stages):
    """Not only the call that shards the model; and in float32 where the script says so."""
    console = run_script(PRECISION.replace("NUM_STAGES", str(stages)), 2, tmp_path, environment)
    assert f"run the plan 'tp1 pp{stages} dp{2 // stages} " in console
    printed = [line for line in console.splitlines() if not line.startswith("[")]
    half = "torch.bfloat16"
    assert printed == [*[f"trained {half}"] * 3, f"evaluated {half}", f"called {half}", "own precision torch.float32"]


SAVING = """
import torch
torch.manual_seed(0)
torch.moreh.option.enable_advanced_parallelization(mixed_precision=False)
from transformers import GPT2Config, GPT2LMHeadModel
from moreh.runtime.engine.checkpoint_api import save_training
model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=1000, n_positions=32))
optimizer = torch.optim.AdamW(model.parameters())
ids = torch.arange(64).view(4, 16)
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
print("saving", flush=True)
for number in range(100000):
    save_training(model, [optimizer], "checkpoint", {"number": number}).result()
    model.save_pretrained("model")
"""


def is_second_worker(process):
    """By its variable or, as a copy that has the variables of another process, by its log."""
    output = Path(f"/proc/{process.pid}/fd/1")
    return process.environ().get("RANK") == "1" or (output.exists() and output.resolve().name == "rank1.log")


def test_worker_killed_while_it_saves_leaves_complete_files(environment, tmp_path):
    """All workers are gone within seconds, and the cause is told."""
    (tmp_path / "script.py").write_text(SAVING)
    process = ForkedProcess(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**environment, "MOREH_WORKERS": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.strip() == "saving":
            break
    while not (tmp_path / "model" / "config.json").exists():
        time.sleep(0.01)
    children = psutil.Process(process.pid).children()
    next(child for child in children if is_second_worker(child)).send_signal(signal.SIGKILL)
    killed = time.monotonic()
    errors = process.communicate(timeout=60)[1]
    assert time.monotonic() - killed < SECONDS_TO_BE_GONE
    assert psutil.wait_procs(children, timeout=SECONDS_TO_BE_GONE)[1] == []
    assert process.returncode == 137
    assert "worker 1 of 2" in errors
    assert "SIGKILL" in errors
    load_file(tmp_path / "model" / "model.safetensors")
    assert (tmp_path / "checkpoint" / ".metadata").exists()
