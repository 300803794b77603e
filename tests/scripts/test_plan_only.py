"""--plan-only of the training scripts: the plan of the settings, without torch, data, network or a free accelerator."""

import os
import re
import sys

import psutil
import pytest
import yaml

from moreh.accelerator.registry import read_registry, start_job, switch_model
from moreh.errors import PlanError
from tests.conftest import ROOT
from tests.helpers.fake_gpus import A100, show_gpus
from tests.helpers.planner.plan_tool import LLAMA, runner, table_rows
from tests.helpers.scripts.tiny_runs import prepare
from utils.config.yaml_file import load_config
from utils.errors import UserError
from utils.plan_only import ARCHITECTURE_FILES, ARCHITECTURES, plan_request, print_plan
from utils.training.model import load_model

LLAMA_70B = str(ROOT / "configs" / "llama3_70b.yaml")
LARGE_ENOUGH = "accelerator.model=8xLarge.4096GB"


@pytest.fixture(autouse=True)
def hundred_columns(monkeypatch):
    """The width of the output, whatever terminal the tests run in."""
    monkeypatch.setenv("COLUMNS", "100")


def plans(text):
    """The rows of the printed table of plans."""
    return table_rows(text)[1:]


# Runs a script and prints its peak memory. ru_maxrss includes the time before the program began, when the process was a
# copy of the tests' process; VmHWM of /proc does not.
MEASURE = """
import pathlib, resource, runpy, sys
sys.argv = sys.argv[1:]
sys.path[0] = str(pathlib.Path(sys.argv[0]).parent)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peak = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    print("peak kB:", *(peak or [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]), file=sys.stderr)
"""


@pytest.fixture
def run_and_measure(run, tmp_path):
    """Run a script in an empty directory; returns exit code, output, imported modules and peak memory in bytes."""

    def measure(*command):
        directory = tmp_path / "here"
        directory.mkdir()
        finished = run(sys.executable, "-c", MEASURE, *command, cwd=directory, PYTHONPROFILEIMPORTTIME="1")
        assert list(directory.iterdir()) == []
        lines = finished.stderr.splitlines()
        imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
        return finished.returncode, finished.stdout, imported, 1024 * int(lines[-1].removeprefix("peak kB:"))

    return measure


@pytest.mark.parametrize("script", ["train_llama3_70b.py", "train_gpt.py"])
def test_large_model_is_planned_without_torch(run_and_measure, state_directory, script):
    profiles = {path.name for path in state_directory.glob("*")}
    code, output, imported, peak_bytes = run_and_measure(
        str(ROOT / script), "--config", LLAMA_70B, "--plan-only", LARGE_ENOUGH
    )
    assert code == 0
    assert re.search(r"^Model +meta-llama/Meta-Llama-3-70B, 70,553,706,496 parameters$", output, re.M)
    assert re.search(r"^Accelerator +8xLarge\.4096GB \(64 x MI250 GCD\) on 8 nodes$", output, re.M)
    assert re.search(r"^Step +512 x 1,024 tokens, bfloat16$", output, re.M)
    assert len(plans(output)) == 10
    assert "numpy" in imported
    assert imported.isdisjoint({"torch", "transformers", "datasets", "tokenizers"})
    assert peak_bytes < 0.5 * 2**30
    assert {path.name for path in state_directory.glob("*")} - profiles <= {"registry.lock"}
    assert read_registry().accelerator(0).model == "xLarge.512GB"


def test_new_model_is_planned_without_torch(run_and_measure):
    """Its keys are checked against the sources of transformers, which are not imported."""
    settings = ["--config", str(ROOT / "configs" / "gpt.yaml"), "--plan-only"]
    code, output, imported, _ = run_and_measure(str(ROOT / "train_gpt.py"), *settings)
    assert code == 0
    assert re.search(r"^Model +a new gpt2, 5,918,720 parameters$", output, re.M)
    assert imported.isdisjoint({"torch", "transformers", "datasets", "tokenizers"})


@pytest.mark.parametrize("arguments", [["train.x=1"], ["--help"]])
def test_wrong_setting_and_help_are_answered_without_torch(run_and_measure, arguments):
    code, _, imported, _ = run_and_measure(
        str(ROOT / "train_gpt.py"), "--config", str(ROOT / "configs" / "gpt.yaml"), *arguments
    )
    assert code == (0 if arguments == ["--help"] else 2)
    assert "pydantic" in imported
    assert imported.isdisjoint({"torch", "transformers", "datasets", "tokenizers"})


def test_plans_are_those_of_moreh_plan_and_fit_the_terminal(monkeypatch, capsys, state_directory):
    print_plan(load_config(LLAMA_70B, [LARGE_ENOUGH]))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    actual = plans(printed)
    code, output, _ = runner(monkeypatch, capsys)(*LLAMA)
    assert code == 0
    assert actual == plans(output)
    assert len(actual) == 10


def test_current_accelerator_is_planned_for_although_it_is_in_use(state_directory, tiny_config, capsys):
    switch_model("4xLarge.2048GB")
    start_job(psutil.Process(os.getppid()), "another job")
    before = (state_directory / "registry.json").read_bytes()
    print_plan(load_config(str(tiny_config), ["accelerator.advanced_parallelization={}", "train.batch_size=32"]))
    assert re.search(r"^Accelerator +4xLarge\.2048GB \(32 x", capsys.readouterr().out, re.M)
    print_plan(load_config(str(tiny_config), ["accelerator={model: 2}"]))
    assert re.search(r"^Accelerator +Medium\.128GB \(2 x", capsys.readouterr().out, re.M)
    assert (state_directory / "registry.json").read_bytes() == before


def test_settings_of_the_project_leave_the_accelerator_as_the_user_has_switched_it(state_directory, capsys):
    for path in (ROOT / "configs").glob("*.yaml"):
        assert "model" not in yaml.safe_load(path.read_text(encoding="utf-8")).get("accelerator", {}), path
    switch_model("12xLarge.6144GB")
    print_plan(load_config(LLAMA_70B, []))
    assert re.search(r"^Accelerator +12xLarge\.6144GB", capsys.readouterr().out, re.M)


def test_gpus_of_this_machine_are_planned_for_unless_a_flavor_is_set(state_directory, tiny_config, capsys, monkeypatch):
    show_gpus(monkeypatch, [A100] * 8)
    for overrides, expected in (
        ([], "this machine (8 x NVIDIA A100-SXM4-40GB) on 1 node"),
        (["accelerator={workers: 2}"], "this machine (2 x NVIDIA A100-SXM4-40GB) on 1 node"),
        (["accelerator={model: Medium.128GB, workers: 1}"], "Medium.128GB (2 x MI250 GCD) on 1 node"),
    ):
        print_plan(load_config(str(tiny_config), overrides))
        assert f"{expected}\n" in capsys.readouterr().out


def test_new_model_is_described_as_it_will_be_made(state_directory, tiny_config, capsys):
    config = load_config(str(tiny_config), ["tokenizer.vocabulary_size=310"])
    print_plan(config)
    parameters = re.search(r"^Model +a new gpt2, ([\d,]+) parameters$", capsys.readouterr().out, re.M)[1]
    model = load_model(config, prepare(config).tokenizer)
    assert int(parameters.replace(",", "")) == model.num_parameters()


def test_saved_model_is_described_from_its_directory(state_directory, tiny_config, make_gpt2, tmp_path, capsys):
    make_gpt2().save_pretrained(tmp_path / "saved")
    pretrained = f"model={{pretrained: {tmp_path / 'saved'}}}"
    print_plan(load_config(str(tiny_config), [pretrained, "tokenizer={}"]))
    assert re.search(r"^Model +saved, \d[\d,]+ parameters$", capsys.readouterr().out, re.M)


def test_options_of_the_hook_restrict_the_plans(state_directory, tiny_config, capsys):
    def planned(options):
        print_plan(load_config(str(tiny_config), [f"accelerator.advanced_parallelization={options}"]))
        return capsys.readouterr().out

    assert all(" pp1 " in row[1] for row in plans(planned("{pipeline_parallel: false}")))
    assert all("recompute:" in row[1] for row in plans(planned("{activation_recomputation: true}")))
    assert re.search(r"^Step +8 x 48 tokens, float32$", planned("{mixed_precision: false}"), re.M)
    one_device = "Not used      accelerator.advanced_parallelization is null, so a training computes on one device"
    assert one_device in planned("null")
    assert one_device not in planned("{}")


def test_memory_that_plans_may_use_is_that_of_the_environment(state_directory, tiny_config, monkeypatch):
    monkeypatch.setenv("MOREH_ADVANCED_PARALLELIZATION_MEMORY_USAGE_CORRECTION_RATIO", "50")
    request = plan_request(load_config(str(tiny_config), []))
    assert request.constraints.memory_fraction == 0.5


REFUSED = {
    "unknown name": (
        ["model={pretrained: no/such}", "tokenizer={}"],
        UserError,
        r"model\.pretrained: no/such: .*give the path of a config",
    ),
    "no directory": (["model={pretrained: ./nowhere}", "tokenizer={}"], UserError, r"model\.pretrained: .*nowhere"),
    "few positions": (["data.max_length=65"], UserError, r"data\.max_length is 65, but the model has 64 positions"),
    "vocabulary": (["tokenizer={pretrained: x}"], UserError, r"give model\.architecture\.vocab_size its number"),
    "nothing to shard over": (
        ["accelerator={advanced_parallelization: {distribute_parameter: true}}", "train.batch_size=1"],
        PlanError,
        r"no plan divides a batch of 1 x 48 over 8 devices as asked",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_setting(state_directory, tiny_config, case):
    overrides, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        print_plan(load_config(str(tiny_config), overrides))


def test_accelerator_that_is_too_small_names_one_that_is_not(state_directory, capsys):
    with pytest.raises(
        UserError, match=r"no plan fits xLarge\.512GB .*: the smallest needs .*: give accelerator\.model="
    ) as refused:
        print_plan(load_config(LLAMA_70B, []))
    remedy = re.search(r"accelerator\.model=\S+GB", str(refused.value))[0]
    print_plan(load_config(LLAMA_70B, [remedy]))
    assert len(plans(capsys.readouterr().out)) > 0


def test_every_architecture_of_the_project_has_a_name_on_the_hub():
    assert set(ARCHITECTURE_FILES.values()) == {path.stem for path in ARCHITECTURES.glob("*.json")}
