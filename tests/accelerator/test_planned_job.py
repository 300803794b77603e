"""What moreh-smi shows of a job whose training was planned: the predicted use of every device."""

import json
import re
import subprocess
import sys

import pytest

from tests.helpers.scripts.fork_server import ForkedProcess

TRAINING = """
import time, torch
from transformers import GPT2Config, GPT2LMHeadModel
torch.moreh.option.enable_advanced_parallelization(num_stages=4, num_micro_batches=4)
model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=128, n_head=4, vocab_size=5000)).cuda().train()
optimizer = torch.optim.AdamW(model.parameters())
ids = torch.zeros(16, 64, dtype=torch.long).cuda()
for _ in range(5):
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print("trained", flush=True)
time.sleep(60)
"""


@pytest.fixture
def run(run_forked):
    return run_forked


@pytest.fixture
def training(environment, tmp_path):
    """A training under the hook in another process, after a few steps."""
    script = tmp_path / "train.py"
    script.write_text(TRAINING, encoding="utf-8")
    process = ForkedProcess(
        [sys.executable, str(script)],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert any(line == "trained\n" for line in process.stdout)
    yield process
    process.kill()
    process.wait()


def test_memory_of_every_device_is_the_plans(run, training):
    report = json.loads(run("moreh-smi", "--json", "-p").stdout)["accelerators"][0]
    assert report["simulated"] is True
    assert re.search(r" pp4 .* mb\d+x4 ", report["predicted_for_plan"] + " ")
    used = [device["memory_used_mib"] for device in report["physical_devices"]]
    assert len(used) == 8
    assert min(used) > 0
    # The devices of a stage are neighbours, and the first and the last one, with the embedding, are the fullest.
    assert used[0::2] == used[1::2]
    assert min(used[0], used[6]) > max(used[2], used[4])
    # Bytes of all devices are rounded up once, those of each device one by one.
    assert sum(used) - 8 <= report["memory_used_mib"] <= sum(used)
    kinds = report["processes"][0]["memory_bytes"]
    assert {"parameters", "gradients", "optimizer", "activations"} <= set(kinds)
    assert 0 <= report["utilization_percent"] <= 100
    text = " ".join(run("moreh-smi").stdout.split())
    assert "Memory usage and utilization are simulated" in text
    assert f"Memory is what the plan '{report['predicted_for_plan']}' is predicted to use" in text


COUNTING = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel
torch.moreh.option.enable_advanced_parallelization()
planned = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50)).cuda().train()
other = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()).cuda()
counted = []
for module in (planned.transformer.h[0], other[0]):
    module.register_forward_pre_hook(
        lambda *arguments: counted.append(torch._C._autograd._top_saved_tensors_default_hooks(True) is not None)
    )
ids = torch.zeros(2, 16, dtype=torch.long).cuda()
for _ in range(2):
    planned(ids, labels=ids).loss.backward()
other(torch.zeros(2, 8).cuda()).sum().backward()
planned.zero_grad()
planned.to(torch.bfloat16)
with torch.no_grad():
    planned(ids, labels=ids)
torch.cuda.reset_peak_memory_stats()
weights = sum(p.nbytes for p in planned.parameters())
assert torch.cuda.memory_allocated() > weights, "weights of another type are counted too"
counted.pop()
print(counted, torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated())
"""


def test_activations_are_counted_until_there_is_a_plan(run_python):
    """And those of models without one always are."""
    finished = run_python(COUNTING)
    assert finished.returncode == 0, finished.stderr
    counted, allocated, peak = finished.stdout.splitlines()[-1].rsplit(" ", 2)
    assert counted == "[True, False, True]"
    assert int(peak) > int(allocated) > 0
