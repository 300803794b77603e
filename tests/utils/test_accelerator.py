"""What the accelerator's settings do before the line: the variables that it reads, and the rank of this process."""

import os

import pytest
import torch
import yaml

from moreh.accelerator.registry import read_registry, switch_model
from moreh.options import ENABLE_VARIABLE
from tests.conftest import ROOT
from utils.accelerator import WORKERS_VARIABLE, accelerator_of
from utils.config.yaml_file import load_config
from utils.errors import UserError
from utils.plan_only import plan_request, print_plan
from utils.workers import max_over_ranks, rank

SETTINGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def variables(monkeypatch, tiny_config):
    """Read what the line would find in the environment under some settings."""
    for name in (WORKERS_VARIABLE, ENABLE_VARIABLE):
        monkeypatch.delenv(name, raising=False)

    def read(settings):
        with accelerator_of(load_config(str(tiny_config), [f"accelerator={settings}"])):
            return os.environ.get(WORKERS_VARIABLE), os.environ.get(ENABLE_VARIABLE)

    return read


def test_settings_decide_the_number_of_workers(variables):
    assert variables("{workers: 3}") == ("3", None)
    assert variables("{workers: null}") == (None, None)


def test_workers_of_the_environment_go_before_those_of_the_settings(variables, monkeypatch):
    monkeypatch.setenv(WORKERS_VARIABLE, "5")
    assert variables("{workers: 3}") == ("5", None)
    assert os.environ[WORKERS_VARIABLE] == "5"


def test_null_switches_the_line_off_and_only_for_this_run(variables):
    assert variables("{advanced_parallelization: null}") == (None, "0")
    assert {WORKERS_VARIABLE, ENABLE_VARIABLE}.isdisjoint(os.environ)
    assert variables("{}") == (None, None)


def test_line_that_is_switched_off_checks_its_options_and_does_nothing(monkeypatch):
    monkeypatch.setenv(ENABLE_VARIABLE, "0")
    monkeypatch.setattr("moreh.option._workers_to_start", None)  # would fail if it were called
    torch.moreh.option.enable_advanced_parallelization(num_stages=2)
    with pytest.raises(ValueError, match="num_stages=0"):
        torch.moreh.option.enable_advanced_parallelization(num_stages=0)


def test_model_of_the_settings_replaces_the_current_one_and_says_so(variables, state_directory, capsys):
    variables("{model: Large.256GB}")
    variables("{model: Large.256GB}")
    variables("{model: null}")
    assert read_registry().accelerator(0).model == "Large.256GB"
    output = " ".join(capsys.readouterr().out.split())
    assert output.count("to Large.256GB, as set by accelerator.model") == 1


def test_workers_need_the_line(tiny_config):
    for workers in (0, '"2"', 1.5):
        with pytest.raises(UserError, match=r"accelerator\.workers: .* is not allowed"):
            load_config(str(tiny_config), [f"accelerator.workers={workers}"])
    with pytest.raises(
        UserError, match=r"accelerator: workers is 2, but advanced_parallelization is null, .*: leave workers out"
    ):
        load_config(str(tiny_config), ["accelerator.workers=2"])
    assert load_config(str(tiny_config), ["accelerator.workers=1"]).accelerator.workers == 1


def test_process_alone_is_rank_0():
    assert rank() == 0
    assert max_over_ranks(3) == 3


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_settings_name_no_accelerator(path):
    assert "model" not in (yaml.safe_load(path.read_text(encoding="utf-8")).get("accelerator") or {})


@pytest.mark.parametrize("name", ["gpt_13b", "llama3_70b"])
def test_chosen_accelerator_is_planned_for(state_directory, name):
    switch_model("12xLarge.6144GB")
    request = plan_request(load_config(str(ROOT / "configs" / f"{name}.yaml"), []))
    assert request.environment.cluster.devices == 96


def test_accelerator_that_cannot_hold_the_training_is_named_with_the_remedy(state_directory):
    switch_model("Small.64GB")
    config = load_config(str(ROOT / "configs" / "llama3_70b.yaml"), [])
    with pytest.raises(
        UserError, match=r"no plan fits Small\.64GB .*: give accelerator\.model=\S+, or a smaller train\.batch"
    ):
        print_plan(config)
