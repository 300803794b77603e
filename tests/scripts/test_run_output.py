"""What a run writes, and where: console and terminal, directories of runs, TensorBoard; and how it ends early."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from filelock import FileLock

from tests.conftest import ROOT
from tests.helpers.scripts.fork_server import ForkedProcess, start_forked
from utils.errors import UserError

HOOK = ["accelerator.advanced_parallelization={}"]


def test_output_to_a_file_is_plain_lines(run_forked, tiny_config, tmp_path):
    """No progress bar, no carriage return, each figure on a line of its own; the hook is on, as by default."""
    finished = run_forked(sys.executable, "train_gpt.py", "--config", tiny_config, *HOOK, "log.every_steps=1")
    assert finished.returncode == 0, finished.stderr
    assert "\r" not in finished.stdout + finished.stderr
    step_line = r"^\[Step \d/4\] [\d]+% \| Loss: [^|]* \| lr [^|]* \| norm [^|]* \| [^|]* tokens/s \| [^|]* GiB"
    assert len(re.findall(step_line, finished.stdout, re.M)) == 4
    assert "[info] MoAI Accelerator is ready to use." in finished.stdout
    plan = r"^\[info\] Simulated: tp1 pp1 dp\d \S+( shard:\w+)? on 8 x MI250 GCD: \S+ ms a step, \S+ GiB$"
    assert len(re.findall(plan, finished.stdout, re.M)) == 1
    assert "candidates" not in finished.stdout
    assert max(len(line.replace(str(tmp_path), "")) for line in finished.stdout.splitlines()) <= 100
    assert re.search(
        r"This machine: 1 worker, micro-batches of at most \d+ tokens, recomputation : none", finished.stdout
    )
    assert finished.stderr == ""
    log = (tmp_path / "runs" / "tiny" / "train.log").read_text(encoding="utf-8")
    assert " [info] MoAI Accelerator is ready to use.\n" in log


def test_lines_of_the_platform_are_logged_if_wanted(run_forked, tiny_config):
    settings = [*HOOK, "log.platform_lines=true"]
    finished = run_forked(sys.executable, "train_gpt.py", "--config", tiny_config, *settings)
    assert re.search(r"^\[info\] The number of candidates is \d+\.$", finished.stdout, re.M)
    assert re.search(r"^\[info\] num_stages : \d+, num_micro_batches : \d+, batch_per_device : ", finished.stdout, re.M)


def test_progress_bar_is_shown_on_a_terminal(environment, tiny_config):
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = ForkedProcess(
        [sys.executable, "train_gpt.py", "--config", str(tiny_config), "log.every_steps=1"],
        env=environment, stdout=follower, stderr=follower, stdin=follower,
    )  # fmt: skip
    os.close(follower)
    text = b""
    try:
        while chunk := os.read(leader, 65536):
            text += chunk
    except OSError:  # the terminal's other end is closed
        pass
    assert process.wait() == 0
    assert b"training: " in text
    assert b"\r[Step 1/4] 25% | Loss: " in text or b"\n[Step 1/4] 25% | Loss: " in text


def test_tensorboard_files_are_written_if_wanted(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(train("run.tensorboard=true") / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("eval_loss")] == [0, 4]


def test_earlier_run_of_the_same_name_is_kept(train):
    directory = train("train.steps=1")
    first = (directory / "metrics.jsonl").read_text(encoding="utf-8")
    train("train.steps=1")
    assert (directory.with_name("tiny.1") / "metrics.jsonl").read_text(encoding="utf-8") == first


def test_failed_start_leaves_an_earlier_run_alone(train, read_metrics):
    directory = train("train.steps=1")
    with pytest.raises(UserError):
        train("data.response_field=nope")
    assert len(read_metrics(directory)) == 2
    assert not directory.with_name("tiny.1").exists()


def test_second_run_of_a_name_that_is_being_written_is_refused(train, tmp_path):
    (tmp_path / "runs").mkdir()
    with FileLock(tmp_path / "runs" / ".tiny.lock"), pytest.raises(UserError, match="another run is writing"):
        train()
    train()


def test_closed_pipe_does_not_end_the_training(environment, tiny_config, tmp_path):
    command = [sys.executable, "train_gpt.py", "--config", tiny_config]
    process = ForkedProcess(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 0
    assert (tmp_path / "runs" / "tiny" / "model" / "model.safetensors").exists()


def test_interrupt_during_imports_is_one_line(environment, tiny_config, tmp_path):
    """Libraries turn a KeyboardInterrupt in their imports into errors of their own."""
    library = (
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n    os.none\n"
    )
    (tmp_path / "torch.py").write_text(library, encoding="utf-8")
    finished = subprocess.run(
        [sys.executable, "train_gpt.py", "--config", tiny_config],
        env={**environment, "PYTHONPATH": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (finished.returncode, finished.stderr) == (130, "interrupted\n")


def test_second_interrupt_ends_the_run_at_any_time(environment, tiny_config, tmp_path):
    """Ctrl-C mostly arrives in a backward pass, where Python's exceptions have nowhere to go."""
    command = ["train_gpt.py", "--config", tiny_config, "train.gradient_accumulation=1000", "log.sample_tokens=0"]
    for delay in (0.1, 0.113, 0.129):
        script = start_forked(command, cwd=ROOT, env=environment)
        while "[Step 0/4] | Held-out loss" not in script.output():
            time.sleep(0.005)
        time.sleep(delay)
        os.kill(script.pid, signal.SIGINT)
        time.sleep(0.1)  # a step takes seconds
        os.kill(script.pid, signal.SIGINT)
        finished = script.finish(timeout=60)
        assert finished.returncode == 130
        asked = "SIGINT: the run saves and ends after this step; a second signal ends it at once"
        # On a busy machine, the second signal may end the run so late that the first one is acknowledged.
        assert finished.stderr.splitlines() in (["interrupted"], [asked, "interrupted"])
    assert not (tmp_path / "runs" / "tiny" / "checkpoints").exists()
    assert "the run ended with KeyboardInterrupt" in (tmp_path / "runs" / "tiny" / "train.log").read_text(
        encoding="utf-8"
    )


def test_dry_run_says_how_long_the_run_takes_and_writes_nothing(run_forked, tiny_config, tmp_path):
    settings = ["train.steps=1000", "log.eval_every_steps=300", "checkpoint.every_steps=1"]
    finished = run_forked(sys.executable, "train_gpt.py", "--config", tiny_config, "--dry-run", *settings)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.partition("Dry run: ")[2].splitlines()
    assert max(map(len, lines)) <= 100
    last = "Dry run: " + " ".join(map(str.strip, lines))
    duration = r"([\d.]+) (m?s)"
    pattern = (
        rf"Dry run: a step takes {duration} \(the first {duration}\), an evaluation {duration}, and 1000 steps with "
    )
    found = re.match(
        pattern + r"5 evaluations about (\d+) (s|min); [\d.]+ GiB of memory in use\. Nothing was written\.", last
    )
    assert found, last
    step_s, _, evaluation_s = (float(found[i]) / (1000 if found[i + 1] == "ms" else 1) for i in (1, 3, 5))
    unit_s = 60 if found[8] == "min" else 1
    assert float(found[7]) * unit_s == pytest.approx(1000 * step_s + 5 * evaluation_s, abs=0.6 * unit_s)
    assert not (tmp_path / "runs" / "tiny").exists()


def test_accelerator_model_of_the_settings_is_switched_to(run, run_forked, tiny_config):
    finished = run_forked(
        sys.executable, "train_gpt.py", "--config", tiny_config, "accelerator.model=4xLarge.2048GB", "train.steps=1"
    )
    assert "4xLarge.2048GB (32 x MI250 GCD, 2096640 MiB)" in finished.stdout
    assert "4xLarge.2048GB  *" in run("moreh-switch-model", input="q\n").stdout
