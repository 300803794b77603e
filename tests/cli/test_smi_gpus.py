"""moreh-smi, moreh-switch-model and the list of accelerators on a machine whose GPUs torch sees."""

import json
import sys

import psutil
import pytest

from moreh.accelerator.job_status import CpuSample, JobStatus, PredictedUse, write_status
from moreh.accelerator.registry import start_job
from moreh.cli import smi, switch_model
from tests.helpers.fake_gpus import A100, show_gpus
from tests.helpers.planner.plan_tool import table_rows


@pytest.fixture
def tool(state_directory, monkeypatch, capsys):
    """Run moreh-smi, or moreh-switch-model if so named; returns standard output."""

    def run_tool(*arguments, name="moreh-smi"):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        assert (switch_model if name == "moreh-switch-model" else smi).main() == 0
        return capsys.readouterr().out

    return run_tool


def test_table_shows_what_the_driver_says(tool, monkeypatch):
    show_gpus(monkeypatch, [A100] * 8, utilization=lambda index: 10 * index)
    monkeypatch.delenv("COLUMNS", raising=False)
    text = tool()
    assert text.splitlines()[4] == (
        "|  Device  |        Name         |     Model      |  Memory Usage  |  Total Memory  |  Utilization  |"
    )
    assert table_rows(text)[-1] == ["* 0", "MoAI Accelerator", "this machine", "8192 MiB", "324288 MiB", "35%"]
    assert "simulated" not in text.lower()
    assert "what their driver says" in " ".join(text.split())


def test_what_needs_pynvml_is_not_available_without_it(tool, monkeypatch):
    show_gpus(monkeypatch, [A100] * 2)
    text = tool("-p")
    assert table_rows(text)[2][-1] == "N/A"
    gpu = ["0", "1", "0", A100, "1024 MiB", "40536 MiB", "N/A", "N/A", "N/A"]
    assert gpu in table_rows(text)


def test_physical_devices_have_temperature_and_power(tool, monkeypatch):
    sensors = {"utilization": lambda i: 99, "temperature": lambda i: 61 + i, "power_draw": lambda i: 300_000}
    show_gpus(monkeypatch, [A100] * 2, **sensors)
    tool("device", "--add", "Small.64GB")
    rows = table_rows(tool("-p"))
    assert ["0", "1", "0", A100, "1024 MiB", "40536 MiB", "99%", "62 C", "300 W"] in rows
    assert ["1", "0", "0", "MI250 GCD", "-", "65520 MiB", "-", "-", "-"] in rows

    machine, chosen = json.loads(tool("-p", "--json"))["accelerators"]
    assert (machine["model"], machine["simulated"], machine["memory_used_mib"]) == ("this machine", False, 2048)
    assert machine["physical_devices"][1]["temperature_c"] == 62
    assert (chosen["model"], chosen["simulated"]) == ("Small.64GB", None)
    assert "temperature_c" not in chosen["physical_devices"][0]


def test_models_are_listed_and_switched(tool, monkeypatch):
    assert "this machine" not in tool("device", "--list")
    assert json.loads(tool("--json", name="moreh-switch-model"))["models"][0]["number"] == 1
    show_gpus(monkeypatch, [A100] * 4)
    assert "|  * 0     |   MoAI Accelerator  |  this machine  |  162144 MiB    |" in tool("device", "--list")
    answers = iter(["2", "0", "q"])
    monkeypatch.setattr("builtins.input", lambda question: print(question) or next(answers))
    lines = tool(name="moreh-switch-model").splitlines()
    assert lines[0] == "Current MoAI Accelerator: this machine"
    assert lines[2:4] == ["0. this machine  *", "1. Small.64GB"]
    assert "Selection (0-13, q, Q): " in lines
    assert 'The MoAI Accelerator model is successfully switched to "Medium.128GB".' in lines
    assert 'The MoAI Accelerator model is successfully switched to "this machine".' in lines
    models = json.loads(tool("--json", name="moreh-switch-model"))
    assert models["current"] == "this machine"
    assert models["models"][0] == {
        "number": 0,
        "name": "this machine",
        "devices": 4,
        "nodes": 1,
        "memory_mib": 162_144,
    }


def start_job_of_workers(gpus, worker_pids):
    """A job on GPUs, whose first worker has reported."""
    job, _ = start_job(psutil.Process(), "train.py")
    use = PredictedUse("tp1 pp1 dp2 mb1x1", {"parameters": 9}, (2**30,) * gpus, 0.9)
    sample = CpuSample(0.0, 0.0)
    write_status(job, JobStatus({"reserved": 2**30}, False, 1, sample, sample, use, worker_pids))


@pytest.mark.parametrize(("worker_pids", "memory"), [((), "1024 MiB"), (((0, 1), (1, 1)), "-")])
def test_memory_of_a_job_is_known_with_one_worker(tool, monkeypatch, worker_pids, memory):
    """Several workers report that of the first one only. The driver's figure has all processes."""
    show_gpus(monkeypatch, [A100] * 2, used_bytes=5 * 2**30)
    start_job_of_workers(2, worker_pids)
    text = tool()
    assert table_rows(text)[2][3] == "10240 MiB"
    assert table_rows(text)[-1][-2:] == ["train.py", memory]
    assert "simulated" not in text.lower()


def test_job_on_gpus_is_shown_where_they_are_hidden(tool, monkeypatch):
    with monkeypatch.context() as seen:
        show_gpus(seen, [A100] * 2)
        start_job_of_workers(2, ())
    rows = table_rows(tool("-p"))
    assert ["0", "1", "0", "MI250 GCD", "1024 MiB", "65520 MiB", "-"] in rows
    assert ["0", "2", "0", "MI250 GCD", "-", "65520 MiB", "-"] in rows
