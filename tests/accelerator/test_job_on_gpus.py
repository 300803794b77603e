"""A job on this machine's GPUs: it is planned for them, and nothing in its log says that it is simulated."""

import json
import re

import psutil
import pytest
import torch

from moreh.accelerator import job as job_module
from moreh.accelerator.job import LocalJob
from moreh.accelerator.memory.out_of_memory import PredictedOutOfMemoryError, SimulatedOutOfMemoryError
from moreh.accelerator.registry import start_job, switch_model
from moreh.accelerator.this_machine import log_devices
from moreh.errors import MorehError
from moreh.options import DEFAULT_OPTIONS, planner_variables
from moreh.planner.hardware import environment as environment_module
from moreh.runtime.batch.model_inputs import ModelInputs
from moreh.runtime.engine.multi_worker_hook import MultiWorkerHook
from moreh.runtime.launch.world import World
from tests.conftest import ROOT
from tests.helpers.fake_gpus import A100, A100_BYTES, show_gpus
from tests.helpers.planner.synthetic_profile import synthetic_profile


@pytest.fixture
def log(state_directory, tmp_path, monkeypatch, caplog):
    """The lines of the log. Plans are written to the test's own directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job_module.logger, "propagate", True)
    caplog.set_level("INFO", "moreh")
    # pytest sees a record twice if the logger has a handler of its own by now.
    return lambda: [record.getMessage() for record in {id(record): record for record in caplog.records}.values()]


@pytest.fixture(scope="module")
def llama_8b():
    """Llama-3-8B without weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    content = json.loads((ROOT / "configs" / "models" / "llama3_8b.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**content))


def plan_on(workers, model, *, local_size=None, bfloat16=True):
    """The plan that so many workers carry out for a batch of 16 x 2048 tokens, and their job."""
    job, accelerator = start_job(psutil.Process(), "train.py")
    local_job = LocalJob(job, accelerator)
    log_devices(accelerator.flavor, on_cpu=local_job.simulated)
    world = World(rank=0, size=workers, local_rank=0, local_size=local_size or workers)
    hook = MultiWorkerHook(DEFAULT_OPTIONS, planner_variables(), local_job, world)
    ids = torch.zeros(16, 2048, dtype=torch.long)
    return hook._plan(model, ModelInputs({"input_ids": ids}, {}, ids, 1.0), bfloat16=bfloat16), local_job


def test_eight_a100_carry_out_a_plan_for_them(log, llama_8b, monkeypatch, tmp_path):
    show_gpus(monkeypatch, [A100] * 8)
    plan, job = plan_on(8, llama_8b)
    assert plan.devices == 8
    fullest_bytes = max(job.predicted.device_bytes)
    assert 0 < fullest_bytes <= 0.8 * A100_BYTES
    lines = log()
    assert lines[0].startswith("This machine: 8 x NVIDIA A100-SXM4-40GB, 40536 MiB each; ")
    (planned,) = [line for line in lines if line.startswith("Planned: ")]
    assert planned.startswith("Planned: on this machine (8 x NVIDIA A100-SXM4-40GB) the plan '")
    assert f"{fullest_bytes / 2**30:.1f} GiB in torch.cuda.max_memory_allocated(), " in planned
    assert " GiB in nvidia-smi of 39.6 GiB on the fullest device" in planned
    assert "The 8 workers run this plan, one per device." in lines
    assert "imulated" not in "".join(lines)
    assert "num_stages" in (tmp_path / "advanced_parallelization_selected_config.dump").read_text(encoding="utf-8")


def test_plan_has_the_precision_of_the_gpus(log, llama_8b, monkeypatch):
    """A V100 has no bfloat16: activations and matmuls in float32 need more memory and time."""
    show_gpus(monkeypatch, [A100] * 8)
    for bfloat16 in (True, False):
        plan_on(8, llama_8b, bfloat16=bfloat16)
    half_s, float32_s = re.findall(r"predicted to take ([\d.]+) s a step", "\n".join(log()))
    assert float(float32_s) > 2 * float(half_s)


def test_detailed_log_says_predicted(log, llama_8b, monkeypatch):
    monkeypatch.setenv("MOREH_ADVANCED_PARALLELIZATION_DETAILED_LOG", "1")
    show_gpus(monkeypatch, [A100] * 8)
    plan_on(8, llama_8b)
    candidates = [line for line in log() if line.startswith("candidate ")]
    assert len(candidates) == 50
    assert all("; predicted step " in line for line in candidates)


def test_plan_is_for_the_workers_not_for_all_gpus(log, llama_8b, monkeypatch):
    show_gpus(monkeypatch, [A100] * 16)
    plan, _ = plan_on(8, llama_8b)
    assert plan.devices == 8
    assert any("on this machine (8 x NVIDIA A100-SXM4-40GB)" in line for line in log())


def test_workers_on_several_machines_are_planned_with_their_network(log, llama_8b, monkeypatch):
    show_gpus(monkeypatch, [A100] * 4)
    plan, _ = plan_on(16, llama_8b, local_size=4)
    assert plan.devices == 16
    assert any("on this machine (16 x NVIDIA A100-SXM4-40GB)" in line for line in log())


def test_rates_of_an_unknown_gpu_are_measured(log, llama_8b, monkeypatch):
    show_gpus(monkeypatch, ["NVIDIA Q7 Prototype"] * 8)
    asked = []
    rates = {"rates": (1e13, 2e14), "rate": 1e11, "latency_s": 1e-5}
    measured = lambda workers: asked.append(workers) or synthetic_profile(workers, **rates)  # noqa: E731
    monkeypatch.setattr(environment_module, "local_profile", measured)
    plan, _ = plan_on(8, llama_8b)
    assert plan.devices == 8
    assert set(asked) == {8}
    lines = log()
    assert "no entry of devices.json has this name, so its rates are measured before the first plan" in lines[0]
    assert any(line.endswith("Rates were measured on this machine.") for line in lines)


def test_what_does_not_fit_is_refused(log, llama_8b, monkeypatch):
    show_gpus(monkeypatch, [A100] * 2)
    with pytest.raises(PredictedOutOfMemoryError) as caught:
        plan_on(2, llama_8b)
    assert isinstance(caught.value, torch.cuda.OutOfMemoryError)
    assert isinstance(caught.value, MorehError)
    assert "No plan fits this machine (2 x NVIDIA A100-SXM4-40GB): the smallest one requested " in str(caught.value)
    assert "bytes, 80% of 40536 MiB. Use more GPUs or a smaller batch" in str(caught.value)
    assert "imulated" not in "".join([*log(), str(caught.value)])


def test_chosen_flavor_is_planned_and_called_simulated(log, llama_8b, monkeypatch):
    show_gpus(monkeypatch, [A100] * 2)
    switch_model("Small.64GB")
    with pytest.raises(SimulatedOutOfMemoryError, match=r"No plan fits accelerator 0 \(Small\.64GB\)"):
        plan_on(2, llama_8b)
    assert log()[0].startswith("Simulated: Small.64GB (1 x MI250 GCD, 65520 MiB) was chosen, so its plans are")
    assert "'moreh-switch-model \"this machine\"'" in log()[0]


SCRIPT = """
import torch
from tests.helpers.fake_gpus import A100, show_gpus

class Setter:
    setattr = staticmethod(setattr)

show_gpus(Setter, [A100] * 8)
import moreh
moreh.attach.attach_to_torch()
torch.moreh.option.enable_advanced_parallelization()
from transformers import GPT2Config, GPT2LMHeadModel

def train():
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64)).train()
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(64).repeat(8, 1)
    for _ in range(2):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print("loss", loss.item())

train()
from moreh.runtime.engine import hook
from moreh.models.describe.from_source import describe
hook.describe_module = lambda model: describe(MODEL)
train()
"""


def test_log_of_a_whole_run_never_says_simulated(run, tmp_path):
    """On one worker, whose model stays on the CPU, since there is nothing to compute on.

    What is predicted not to fit is tried: in plain PyTorch it might just fit.
    """
    model = str(ROOT / "configs" / "models" / "llama3_8b.json")
    (tmp_path / "train.py").write_text(SCRIPT.replace("MODEL", repr(model)), encoding="utf-8")
    variables = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "MOREH_WORKERS": "1", "PYTHONPATH": str(ROOT)}
    finished = run("python", "train.py", cwd=tmp_path, **variables)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("Simulated") == finished.stderr.count("Simulated") == 0
    output, of_large, rest = re.split(r"^loss [\d.]+$", finished.stdout, flags=re.M)
    assert not rest.strip()
    assert "[info] This machine: 8 x NVIDIA A100-SXM4-40GB, 40536 MiB each; " in output
    assert "[info] Planned: on this machine (1 x NVIDIA A100-SXM4-40GB) the plan " in output
    assert "[info] This machine: 1 worker, micro-batches of at most " in output
    assert "[warning] Error Code 4: OUT_OF_MEMORY (predicted). No plan fits this machine (1 x NVIDIA A100" in of_large
    assert "Trying the plan that needs the least memory." in of_large
    assert "[info] This machine: 1 worker, micro-batches of at most " in of_large
