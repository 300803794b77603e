"""moreh-smi as a person and as a script use it."""

import json
import os
import re
import subprocess
import sys
import time

import psutil
import pytest

from moreh.accelerator.job_status import CpuSample, JobStatus, write_status
from moreh.accelerator.registry import start_job
from moreh.cli import smi
from moreh.cli.smi_report import SIMULATED_NOTE
from moreh.version import __version__
from tests.helpers.scripts.fork_server import ForkedProcess
from tests.helpers.scripts.launched_scripts import WITHOUT_MODELS

HOLDING_SCRIPT = """
import sys, time, torch
weights = torch.ones(1 << 20, device="cuda")
print("ready", flush=True)
end = time.time() + 60
while time.time() < end:
    weights.add_(1)
    time.sleep(PAUSE)
"""
# Takes no time from the processes that wait for the accelerator.
PAUSE_S = 0.5


@pytest.fixture
def run(run_forked):
    return run_forked


@pytest.fixture
def busy(request, environment, tmp_path):
    """A job on the accelerator. With a parameter, its pause between computations, it is started as a user starts it.

    Else it is a copy of the fork server, whose command line is what the tools show.
    """
    pause = getattr(request, "param", PAUSE_S)
    (tmp_path / "busy.py").write_text(HOLDING_SCRIPT.replace("PAUSE", str(pause)), encoding="utf-8")
    # By its name alone: tables cut commands that are as long as a temporary directory's path can be.
    process = (subprocess.Popen if hasattr(request, "param") else ForkedProcess)(
        [sys.executable, "busy.py", "--epochs", "3"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert any(line == "ready\n" for line in process.stdout)
    yield process
    process.kill()
    process.wait()


def test_tables_fit_a_narrow_terminal_and_keep_their_layout_in_a_pipe(run):
    run("moreh-switch-model", "48xLarge.24576GB")
    narrow = run("moreh-smi", "-p", COLUMNS="100").stdout.splitlines()
    assert max(map(len, narrow)) <= 100
    assert any(line.startswith("| * 0    |  MoAI Accelerator | 48xLarge.24576GB |") for line in narrow)
    layout = "|  * 0     |   MoAI Accelerator  |  48xLarge.24576GB  |  -             |"
    assert any(line.startswith(layout) for line in run("moreh-smi", COLUMNS="").stdout.splitlines())


def test_idle_table_has_the_documented_format(run):
    run("moreh-switch-model", "Large.256GB")
    lines = run("moreh-smi").stdout.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d [A-Z][a-z]+ \d\d, \d{4}", lines[0])
    assert re.fullmatch(rf"\| +Current Version: {__version__}  Latest Version: -  \|", lines[2])
    assert (
        lines[4]
        == "|  Device  |        Name         |     Model     |  Memory Usage  |  Total Memory  |  Utilization  |"
    )
    assert set(lines[5]) == {"+", "="}
    assert (
        lines[6]
        == "|  * 0     |   MoAI Accelerator  |  Large.256GB  |  -             |  -             |  -            |"
    )
    assert len({len(line) for line in lines[1:]}) == 1
    assert len(lines) == 8


@pytest.mark.parametrize("busy", [0], indirect=True)
def test_running_job_is_shown_from_another_terminal_and_not_after_kill(run, busy):
    time.sleep(0.7)  # a utilization needs half a second of CPU time
    text = run("moreh-smi", COLUMNS="").stdout
    assert re.search(
        r"\|  \* 0     \|   MoAI Accelerator  \|  xLarge.512GB  \|  \d+ MiB +\|  524160 MiB    \|  \d+% +\|", text
    )
    process = next(line for line in text.splitlines() if "busy.py" in line)
    cells = [cell.strip() for cell in process.strip("|").split("|")]
    command = psutil.Process(busy.pid).cmdline()[1:]
    assert cells[:4] == ["0", "1", str(busy.pid), " ".join([sys.executable.split("/")[-1], *command])]
    notes = text.split("+\n")[-1].strip().splitlines()
    assert " ".join(notes) == SIMULATED_NOTE
    assert max(map(len, notes)) <= 100

    report = json.loads(run("moreh-smi", "--json", "-p").stdout)["accelerators"][0]
    assert report["simulated"] is True
    assert report["processes"][0]["pid"] == busy.pid
    assert 10 <= report["utilization_percent"] <= 100
    devices = report["physical_devices"]
    assert [device["memory_used_mib"] for device in devices] == [report["memory_used_mib"]] + [None] * 7
    assert {device["memory_total_mib"] for device in devices} == {65_520}

    busy.kill()
    busy.wait()
    text = run("moreh-smi").stdout
    assert "Processes" not in text
    assert "busy.py" not in text


def test_second_process_is_refused_and_told_how_to_add_an_accelerator(run, run_python, busy):
    refused = run_python("import torch\ntorch.zeros(1).cuda()", MOREH_WAIT="0")
    assert refused.returncode != 0
    assert re.search(r"AcceleratorBusyError: accelerator 0 is in use by job 1 \(process \d+: .*\.py", refused.stderr)
    assert "moreh-smi device --add" in refused.stderr
    run("moreh-smi", "device", "--add", "1")
    run("moreh-smi", "device", "--switch", "1")
    assert run_python("import torch\ntorch.zeros(1).cuda()").returncode == 0


WAITING = """
import torch
torch.moreh.option.enable_advanced_parallelization()
torch.zeros(1).cuda()
print("went on")
"""


@pytest.mark.parametrize("command", [(), ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")])
def test_second_process_waits_until_the_first_has_ended(environment, tmp_path, busy, command):
    script = tmp_path / "waiting.py"
    script.write_text((WITHOUT_MODELS if command else "") + WAITING, encoding="utf-8")
    waiting = (subprocess.Popen if command else ForkedProcess)(
        [sys.executable, *command, script], env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    line = next(line for line in waiting.stdout if "in use" in line)
    assert re.match(r"\[warning\] accelerator 0 is in use by job 1 \(process \d+: .*\.py.*\)\. This process wai", line)
    assert waiting.poll() is None
    busy.kill()
    busy.wait()
    output, _ = waiting.communicate(timeout=120)
    assert waiting.returncode == 0
    assert output.count("went on") == max(1, len(command[4:]) * 2)
    assert "MoAI Accelerator is ready to use." in output
    assert "in use" not in output


def test_wrong_wait_is_refused(run_python, busy):
    refused = run_python("import torch\ntorch.zeros(1).cuda()", MOREH_WAIT="perhaps")
    assert (
        "OptionError: MOREH_WAIT='perhaps': expected 0 (raise an error if the accelerator is busy) or 1"
        in refused.stderr
    )


def test_reset_ends_the_registered_process_only(run, busy):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        said = run("moreh-smi", "--reset").stdout
        assert said.startswith(f"Ended job 1 (process {busy.pid}: ")
        assert busy.wait() != 0
        assert other.poll() is None
        assert run("moreh-smi", "-r").stdout == "No job is running on accelerator 0: nothing was ended.\n"
    finally:
        other.kill()
        other.wait()


def test_reset_kills_a_job_that_does_not_end(environment, tmp_path, monkeypatch):
    script = tmp_path / "stubborn.py"
    script.write_text(
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        + HOLDING_SCRIPT.replace("PAUSE", str(PAUSE_S)),
        encoding="utf-8",
    )
    process = ForkedProcess([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True)
    assert any(line == "ready\n" for line in process.stdout)
    monkeypatch.setattr("moreh.cli.smi.SECONDS_AFTER_GRACE", 0.3)
    monkeypatch.setattr("moreh.cli.smi.grace_of", lambda job: 0.1)
    from moreh.cli.smi import _end_job

    assert "did not end" in _end_job(None)
    assert process.wait() == -9


def test_reset_waits_as_long_as_the_job_needs_to_save(state_directory, monkeypatch):
    job, _ = start_job(psutil.Process(os.getppid()), "train_gpt.py")
    write_status(job, JobStatus({}, True, 1, CpuSample(0, 0), CpuSample(1, 0), grace_s=300.0))
    waited = []
    monkeypatch.setattr(psutil.Process, "terminate", lambda self: None)
    monkeypatch.setattr(smi, "_ends_within", lambda seconds, job: waited.append(seconds) or True)
    assert smi._end_job(None).startswith("Ended job 1 ")
    assert waited == [300.0 + smi.SECONDS_AFTER_GRACE]


def test_loop_shows_again(environment):
    process = subprocess.Popen(["moreh-smi", "-l", "0.1"], env=environment, stdout=subprocess.PIPE, text=True)
    headers = 0
    for line in process.stdout:
        headers += "Current Version" in line
        if headers == 3:
            break
    process.terminate()
    process.wait()
    assert headers == 3


def test_json_of_every_answer(run):
    added = json.loads(run("moreh-smi", "--json", "device", "--add", "3").stdout)
    assert [row["model"] for row in added["accelerators"]] == ["xLarge.512GB", "Large.256GB"]
    assert json.loads(run("moreh-smi", "--json", "--reset").stdout)["result"].startswith("No job is running")
    assert len(json.loads(run("moreh-smi", "--json", "-t").stdout)["token"]) == 32


def test_strange_command_lines_stay_in_the_table(run, environment):
    source = "import torch, time\ntorch.zeros(1).cuda()\nprint('ready', flush=True)\ntime.sleep(60)"
    arguments = [sys.executable, "-c", source, "\033[31m", b"\xff\xe4", "x" * 3000]
    job = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert any(line == "ready\n" for line in job.stdout)
        for encoding in ("utf-8:strict", "ascii:strict"):
            finished = run("moreh-smi", PYTHONIOENCODING=encoding)
            assert finished.returncode == 0, finished.stderr
            assert "\033" not in finished.stdout
            assert max(map(len, finished.stdout.splitlines())) <= 202
    finally:
        job.kill()
        job.wait()


def test_workers_of_a_loader_share_their_parents_job(run_python):
    """They touch the device before their parent does; none of them is a second job."""
    source = """
import torch
class Moved(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        return torch.ones(1).cuda()
if __name__ == "__main__":
    print(sum(batch.sum().item() for batch in torch.utils.data.DataLoader(Moved(), num_workers=2)))
    torch.zeros(1).cuda()
"""
    finished = run_python(source)
    assert finished.returncode == 0, finished.stderr
    assert "8.0" in finished.stdout


def test_version_and_token_are_printed_and_help_names_all_options(run):
    assert run("moreh-smi", "-v").stdout == f"moreh-smi {__version__}\n"
    assert "no server" in run("moreh-smi", "-s").stdout
    token = run("moreh-smi", "-t").stdout
    assert re.fullmatch(r"[0-9a-f]{32}\n", token)
    assert run("moreh-smi", "--token").stdout == token
    help_text = run("moreh-smi", "-h").stdout
    for option in ("--idx", "--token", "--reset", "--server-version", "--version", "device"):
        assert option in help_text
