"""moreh-smi and moreh-switch-model as a person and as a script use them."""

import json
import re
import subprocess
import sys
import time

import psutil
import pytest

from moreh.cli.tables import Column, draw_table
from moreh.version import __version__

BUSY_SCRIPT = """
import sys, time, torch
weights = torch.ones(1 << 20, device="cuda")
print("ready", flush=True)
end = time.time() + 60
while time.time() < end:
    weights.add_(1)
"""


@pytest.fixture
def busy(environment, tmp_path):
    """A job that keeps the accelerator busy, started from a shell of its own."""
    (tmp_path / "busy.py").write_text(BUSY_SCRIPT, encoding="utf-8")
    # By its name alone: tables cut commands that are as long as a temporary directory's path can be.
    process = subprocess.Popen(
        [sys.executable, "busy.py", "--epochs", "3"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert any(line == "ready\n" for line in process.stdout)
    yield process
    process.kill()
    process.wait()


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


def test_columns_grow_with_their_content():
    table = draw_table([Column("A", 3), Column("B", 1, "right")], [["long text", "1"], ["x", "22"]])
    assert table.splitlines()[3:5] == ["|  long text  |   1  |", "|  x          |  22  |"]


def test_running_job_is_shown_from_another_terminal_and_not_after_kill(run, busy):
    time.sleep(0.7)  # a utilization needs half a second of processor time
    text = run("moreh-smi").stdout
    assert re.search(
        r"\|  \* 0     \|   MoAI Accelerator  \|  xLarge.512GB  \|  \d+ MiB +\|  524160 MiB    \|  \d+% +\|", text
    )
    process = next(line for line in text.splitlines() if "busy.py" in line)
    cells = [cell.strip() for cell in process.strip("|").split("|")]
    command = psutil.Process(busy.pid).cmdline()[1:]
    assert cells[:4] == ["0", "1", str(busy.pid), " ".join([sys.executable.split("/")[-1], *command])]
    assert "simulated" in text

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
    refused = run_python("import torch\ntorch.zeros(1).cuda()")
    assert refused.returncode != 0
    assert re.search(r"AcceleratorError: accelerator 0 is in use by job 1 \(process \d+: .*busy.py", refused.stderr)
    assert "moreh-smi device --add" in refused.stderr
    run("moreh-smi", "device", "--add", "1")
    run("moreh-smi", "device", "--switch", "1")
    assert run_python("import torch\ntorch.zeros(1).cuda()").returncode == 0


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
    script.write_text("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + BUSY_SCRIPT, encoding="utf-8")
    process = subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True)
    assert any(line == "ready\n" for line in process.stdout)
    monkeypatch.setattr("moreh.cli.smi.SECONDS_UNTIL_KILL", 0.3)
    from moreh.cli.smi import _end_job

    assert "did not end" in _end_job(None)
    assert process.wait() == -9


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


def test_device_commands(run):
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
    assert "Selection (1-13, q, Q):" in added.stdout
    assert "no model '99'" in added.stdout
    assert "Accelerator 1 (Medium.128GB) was added." in added.stdout
    assert "is the current one now" in run("moreh-smi", "device", "--switch", input="x\n5\n1\n").stdout
    assert "was removed" in run("moreh-smi", "device", "--rm", input="1\n").stdout
    assert "was removed" not in run("moreh-smi", "device", "--rm", input="q\n").stdout


def test_switch_model_dialogue(run):
    said = run("moreh-switch-model", input="8\nQ\n").stdout
    assert said.startswith("Current MoAI Accelerator: xLarge.512GB\n\n1. Small.64GB\n")
    assert "4. xLarge.512GB  *\n" in said
    assert 'The MoAI Accelerator model is successfully switched to "4xLarge.2048GB".' in said
    assert "8. 4xLarge.2048GB  *\n" in said
    assert said.count("Selection (1-13, q, Q): ") == 2


def test_switch_model_without_questions(run):
    assert 'switched to "8xLarge.4096GB"' in run("moreh-switch-model", "10").stdout
    assert json.loads(run("moreh-switch-model", "--json", "1").stdout) == {"accelerator": 0, "current": "Small.64GB"}
    models = json.loads(run("moreh-switch-model", "--json").stdout)["models"]
    assert models[12] == {"number": 13, "name": "48xLarge.24576GB", "devices": 384, "nodes": 48, "memory_mib": 25159680}


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["moreh-switch-model", "14"], 1, "error: no model '14'"),
        (["moreh-switch-model", "1", "2"], 2, "unrecognized arguments"),
        (["moreh-switch-model"], 1, "give the value as an argument"),
        (["moreh-smi", "-i", "3"], 1, "error: no accelerator 3"),
        (["moreh-smi", "-i", "x"], 2, "invalid int value"),
        (["moreh-smi", "-l", "0"], 2, "give a number of seconds above 0"),
        (["moreh-smi", "-l", "abc"], 2, "abc: give a number of seconds above 0"),
        (["moreh-smi", "-l", "1e18"], 2, "at most 86400"),
        (["moreh-smi", "-v", "device", "--add", "3"], 2, "device and --version cannot be combined"),
        (["moreh-smi", "-i", "0", "device", "--rm", "1"], 2, "--idx cannot be combined with device"),
        (["moreh-smi", "-p", "--reset"], 2, "--physical cannot be combined with --reset"),
        (["moreh-smi", "device"], 2, "one of the arguments"),
        (["moreh-smi", "device", "--rm", "x"], 1, "no accelerator 'x'"),
        (["moreh-smi", "device", "--rm", "0"], 1, "is the only one"),
        (["moreh-smi", "device", "--add", "tiny"], 1, "no model 'tiny'"),
    ],
)
def test_exit_codes(run, command, code, message):
    finished = run(*command, input="")
    assert finished.returncode == code
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr


def test_json_of_every_answer(run):
    added = json.loads(run("moreh-smi", "--json", "device", "--add", "3").stdout)
    assert [row["model"] for row in added["accelerators"]] == ["xLarge.512GB", "Large.256GB"]
    assert json.loads(run("moreh-smi", "--json", "--reset").stdout)["result"].startswith("No job is running")
    assert len(json.loads(run("moreh-smi", "--json", "-t").stdout)["token"]) == 32


def test_state_directory_that_cannot_be_used(run, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    finished = run("moreh-smi", MOREH_STATE_DIR=str(tmp_path / "file"))
    assert finished.returncode == 1
    assert "cannot be used: Not a directory. Set MOREH_STATE_DIR" in finished.stderr
    assert "Traceback" not in run("moreh-switch-model", "1", MOREH_STATE_DIR=str(tmp_path / "file")).stderr


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


def test_one_answer_through_a_pipe_is_enough(run):
    assert run("moreh-switch-model", input="3\n").returncode == 0


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


def test_small_options(run):
    assert run("moreh-smi", "-v").stdout == f"moreh-smi {__version__}\n"
    assert "no server" in run("moreh-smi", "-s").stdout
    token = run("moreh-smi", "-t").stdout
    assert re.fullmatch(r"[0-9a-f]{32}\n", token)
    assert run("moreh-smi", "--token").stdout == token
    for option in ("--idx", "--token", "--reset", "--server-version", "--version", "device"):
        assert option in run("moreh-smi", "-h").stdout


@pytest.mark.parametrize("module", ["smi", "switch_model"])
def test_tools_do_not_import_torch(run, module):
    source = (
        f"import sys, moreh.cli.{module} as m; sys.argv = ['tool', '--json']; m.main(); print('torch' in sys.modules)"
    )
    assert run(sys.executable, "-c", source).stdout.endswith("\nFalse\n")
