"""Changing the accelerators with moreh-smi device and moreh-switch-model, and what both tools refuse."""

import json
import sys

import pytest

from moreh.accelerator.flavors import all_flavors


def test_devices_are_added_switched_listed_and_removed(run):
    assert "Accelerator 1 (Large.256GB) was added." in run("moreh-smi", "device", "--add", "3").stdout
    assert "Accelerator 1 (Large.256GB) is the current one now." in run("moreh-smi", "device", "--switch", "1").stdout
    listed = json.loads(run("moreh-smi", "--json", "device", "--list").stdout)
    assert listed == json.loads(run("moreh-smi", "device", "--list", "--json").stdout)
    assert [(a["index"], a["current"]) for a in listed["accelerators"]] == [(0, False), (1, True)]
    assert "* 1" in run("moreh-smi", "device", "--list").stdout
    assert "|    0 " not in run("moreh-smi", "-i", "1").stdout
    assert "Accelerator 0 (xLarge.512GB) was removed." in run("moreh-smi", "device", "--rm", "0").stdout


def test_device_commands_ask_when_the_argument_is_left_out(run):
    added = run("moreh-smi", "device", "--add", input="99\n2\n")
    assert "13. 48xLarge.24576GB" in added.stdout
    assert f"Selection (1-{len(all_flavors())}, q, Q):" in added.stdout
    assert "no model '99'" in added.stdout
    assert "Accelerator 1 (Medium.128GB) was added." in added.stdout
    assert "is the current one now" in run("moreh-smi", "device", "--switch", input="x\n5\n1\n").stdout
    assert "was removed" in run("moreh-smi", "device", "--rm", input="1\n").stdout
    assert "was removed" not in run("moreh-smi", "device", "--rm", input="q\n").stdout


def test_switch_model_asks_until_the_user_quits(run):
    said = run("moreh-switch-model", input="8\nQ\n").stdout
    assert said.startswith("Current MoAI Accelerator: xLarge.512GB\n\n1. Small.64GB\n")
    assert "4. xLarge.512GB  *\n" in said
    assert 'The MoAI Accelerator model is successfully switched to "4xLarge.2048GB".' in said
    assert "8. 4xLarge.2048GB  *\n" in said
    assert said.count(f"Selection (1-{len(all_flavors())}, q, Q): ") == 2


def test_switch_model_without_questions(run):
    assert 'switched to "8xLarge.4096GB"' in run("moreh-switch-model", "10").stdout
    assert json.loads(run("moreh-switch-model", "--json", "1").stdout) == {"accelerator": 0, "current": "Small.64GB"}
    models = json.loads(run("moreh-switch-model", "--json").stdout)["models"]
    assert models[12] == {"number": 13, "name": "48xLarge.24576GB", "devices": 384, "nodes": 48, "memory_mib": 25159680}


def test_one_answer_through_a_pipe_is_enough(run):
    assert run("moreh-switch-model", input="3\n").returncode == 0


def test_state_directory_that_cannot_be_used_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    finished = run("moreh-smi", MOREH_STATE_DIR=str(tmp_path / "file"))
    assert finished.returncode == 1
    assert "cannot be used: Not a directory. Set MOREH_STATE_DIR" in finished.stderr
    assert "Traceback" not in run("moreh-switch-model", "1", MOREH_STATE_DIR=str(tmp_path / "file")).stderr


@pytest.mark.parametrize("module", ["smi", "switch_model"])
def test_tools_do_not_import_torch(run, module):
    source = (
        f"import sys, moreh.cli.{module} as m; sys.argv = ['tool', '--json']; m.main(); print('torch' in sys.modules)"
    )
    assert run(sys.executable, "-c", source).stdout.endswith("\nFalse\n")


def test_model_is_switched_by_the_platforms_flag(run):
    assert 'switched to "Medium.128GB"' in run("moreh-switch-model", "-M", "2").stdout
    assert 'switched to "Large.256GB"' in run("moreh-switch-model", "--model", "Large.256GB").stdout
    refused = run("moreh-switch-model", "1", "-M", "2")
    assert refused.returncode == 2
    assert "two models, 1 and 2: give one" in refused.stderr


def test_options_of_device_need_no_command(run):
    """As on the platform: `moreh-smi --rm 1`."""
    assert "Accelerator 1 (Large.256GB) was added." in run("moreh-smi", "--add", "3").stdout
    assert "Accelerator 1 (Large.256GB) is the current one now." in run("moreh-smi", "--switch=1").stdout
    listed = json.loads(run("moreh-smi", "--json", "--list").stdout)["accelerators"]
    assert [accelerator["current"] for accelerator in listed] == [False, True]
    assert "Accelerator 1 (Large.256GB) was removed." in run("moreh-smi", "--rm", "1").stdout
    refused = run("moreh-smi", "--rm", "x")
    assert refused.returncode == 1
    assert "no accelerator 'x'" in refused.stderr
