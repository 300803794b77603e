"""What the hook plans for the accelerator at the first training batch: options, environment, files, refusals."""

import pytest

from tests.conftest import ROOT


@pytest.fixture
def run(run_forked):
    return run_forked


PLAN_ONE = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel
torch.moreh.option.enable_advanced_parallelization(**{options})
model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=32, n_head=2, vocab_size=64)).cuda().train()
ids = torch.zeros({batch}, 8, dtype=torch.long).cuda()
with torch.no_grad():
    model(ids, labels=ids)
print("not planned yet")
for _ in range(2):
    model(ids, labels=ids).loss.backward()
"""


def test_options_restrict_the_plan_of_the_accelerator(run_python):
    options = {"num_stages": 4, "num_micro_batches": 8, "activation_recomputation": True, "distribute_parameter": True}
    finished = run_python(PLAN_ONE.format(options=options, batch=16))
    assert finished.returncode == 0, finished.stderr
    before, after = finished.stdout.split("not planned yet")
    assert "number of candidates" not in before
    assert after.count("The number of candidates is") == 1
    assert "num_stages : 4, num_micro_batches : 8, batch_per_device : 1, No TP, recomputation : " in after
    assert "none(0)" not in after
    assert "distribute_param : true" in after


def test_detailed_log_goes_to_the_console_or_to_a_file(run_python, tmp_path):
    prefix = "MOREH_ADVANCED_PARALLELIZATION_"
    console = run_python(PLAN_ONE.format(options={}, batch=16), **{prefix + "DETAILED_LOG": "1"})
    listed = [line for line in console.stdout.splitlines() if line.startswith("[info] candidate ")]
    assert len(listed) == 50
    assert "schedule : " in listed[0]
    assert not (tmp_path / "autoconfig_log.dump").exists()
    variables = {"DETAILED_LOG": "2", "MAX_PARALLEL_COMPILE_THREADS": "1"}
    in_file = run_python(
        PLAN_ONE.format(options={}, batch=16), **{prefix + name: value for name, value in variables.items()}
    )
    assert "candidate 1:" not in in_file.stdout
    lines = (tmp_path / "autoconfig_log.dump").read_text().splitlines()
    assert [line.split("; simulated")[0] for line in lines] == [
        line.removeprefix("[info] ").split("; simulated")[0] for line in listed
    ]


def test_training_that_no_plan_fits_is_refused(run_python):
    source = """
import torch
from moreh.runtime.engine import hook
from moreh.models.describe.from_source import describe
from transformers import GPT2Config, GPT2LMHeadModel
hook.describe_module = lambda model: describe("MODEL")
torch.moreh.option.enable_advanced_parallelization()
model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)).cuda().train()
ids = torch.zeros(8, 8, dtype=torch.long).cuda()
try:
    model(ids, labels=ids)
except torch.cuda.OutOfMemoryError as error:
    print(error)
"""
    model = ROOT / "configs" / "models" / "llama3_405b.json"
    console = run_python(source.replace("MODEL", str(model))).stdout
    assert "OUT_OF_MEMORY (simulated). No plan fits accelerator 0 (xLarge.512GB): the smallest one requested" in console
    assert "moreh-switch-model" in console


def test_numbers_that_no_plan_has_are_maxima(run_python):
    finished = run_python(PLAN_ONE.format(options={"num_stages": 3, "num_micro_batches": 5}, batch=16))
    assert "num_stages=3: no plan of this training has so many under the options given; it is planned with 2." in (
        finished.stdout
    )
    assert "num_micro_batches=5: no plan" in finished.stdout
    assert "num_stages : 2, num_micro_batches : 4, " in finished.stdout


def test_batch_that_no_plan_divides_is_refused(run_python):
    finished = run_python(PLAN_ONE.format(options={"distribute_parameter": True}, batch=1))
    assert "PlanError: no plan divides a batch of 1 x 8 over 8 devices as asked" in finished.stderr


def test_larger_batches_are_planned_again(run_python):
    source = (
        PLAN_ONE.format(options={}, batch=16)
        + """
for rows in (16, 8, 32, 24, 32):
    print("batch of", rows)
    model(torch.zeros(rows, 8, dtype=torch.long), labels=torch.zeros(rows, 8, dtype=torch.long)).loss.backward()
"""
    )
    after = run_python(source).stdout.split("batch of ")[1:]
    planned = [part.split()[0] for part in after if "The number of candidates is" in part]
    assert planned == ["32"]
    assert len(after) == 5


def test_directory_that_cannot_be_written_does_not_end_training(run_python):
    source = PLAN_ONE.format(options={}, batch=16).replace("import torch\n", "import os, torch\nos.chdir('/proc')\n", 1)
    finished = run_python(source)
    assert finished.returncode == 0, finished.stderr
    assert "[info] advanced_parallelization_selected_config.dump is not written: " in finished.stdout


def test_one_device_has_nothing_to_distribute(run, run_python):
    run("moreh-switch-model", "Small.64GB")
    finished = run_python(PLAN_ONE.format(options={"distribute_parameter": True}, batch=16))
    assert finished.returncode == 0, finished.stderr
    assert "num_stages : 1" in finished.stdout
    assert "distribute_param : false" in finished.stdout


def test_small_batch_leaves_devices_idle(run_python):
    finished = run_python(PLAN_ONE.format(options={}, batch=1).replace("n_layer=4", "n_layer=1"))
    assert finished.returncode == 0, finished.stderr
    assert "Simulated: 6 of 8 devices stay idle: no plan divides a batch of 1 x 8 over 8 devices" in finished.stdout
    assert "batch_per_device : 1" in finished.stdout


def test_model_that_is_no_decoder_is_trained_as_it_is(run_python):
    source = """
import torch
torch.moreh.option.enable_advanced_parallelization()
model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 2)).cuda().train()
print(model(torch.zeros(2, 3, dtype=torch.long)).shape)
"""
    console = run_python(source).stdout
    assert "[info] This model cannot be planned, so it is trained without a plan: " in console
    assert console.endswith("torch.Size([2, 3, 2])\n")
