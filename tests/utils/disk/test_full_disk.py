"""What a run cannot write is said in a line, and the training goes on. /dev/full is a disk that is full."""

import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from moreh.planner.report.figures import new_figure
from tests.helpers.scripts.fork_server import ForkedProcess
from tests.helpers.scripts.tiny_runs import prepare
from utils.config.yaml_file import load_config
from utils.logging import plot, run_log
from utils.logging.metrics_file import MetricsFile
from utils.training.checkpoint import checkpoints as checkpoints_module
from utils.training.checkpoint.disk_space import lack_of_space

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@contextmanager
def files_of_at_most(size):
    """A limit that all libraries feel as they feel a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_lines_of_metrics_are_kept_until_the_disk_takes_them(tmp_path):
    path, said = tmp_path / "metrics.jsonl", []
    file = MetricsFile(path, said.append)
    file.add({"step": 1, "loss": 2.0})
    size = path.stat().st_size
    with files_of_at_most(size + 5):
        file.add({"step": 2, "loss": 1.0})
        file.add({"step": 3, "loss": 0.5})
        assert path.stat().st_size == size  # without half of a line
    assert said == [
        f"warning: {path} cannot be written: File too large; training continues, and its lines are tried again"
    ]
    file.add({"step": 4, "loss": 0.25})
    file.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


@needs_full
def test_logs_that_cannot_be_written_do_not_end_a_training(train, tmp_path, monkeypatch, capsys):
    """train.log, metrics.jsonl, run.json and report.html are on a full disk, and the picture cannot be drawn."""
    original = run_log._make_directory

    def make_directory(directory):
        original(directory)
        (directory / "train.log").symlink_to("/dev/full")

    opened = MetricsFile.__init__

    def open_on_full_disk(self, path, warn):
        opened(self, path, warn)
        self._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115

    monkeypatch.setattr(MetricsFile, "__init__", open_on_full_disk)
    monkeypatch.setattr(run_log, "_make_directory", make_directory)
    monkeypatch.setattr("utils.logging.plot.new_figure", write_to_full_disk)
    monkeypatch.setattr("utils.report.live.write_text", write_to_full_disk)
    monkeypatch.setattr("utils.report.live.write_state", write_to_full_disk)
    directory = train()
    out, err = capsys.readouterr()
    assert (directory / "model" / "config.json").exists()
    assert err.count("train.log cannot be written: No space left on device; training continues\n") == 1
    said = " ".join(out.split())  # lines of the console are wrapped
    assert said.count("metrics.jsonl cannot be written: No space left on device") == 1
    assert said.count("report.html was not written") == 1
    assert "the loss curves could not be drawn" in said
    assert "Traceback" not in out + err


def write_to_full_disk(*_, **settings):
    raise OSError(28, os.strerror(28))


@needs_full
def test_full_disk_behind_standard_output_does_not_end_a_training(environment, tiny_config, tmp_path):
    command = [sys.executable, "train_gpt.py", "--config", tiny_config, "train.steps=2"]
    variables = {**environment, "MPLBACKEND": "no such backend"}
    with Path("/dev/full").open("wb") as full:
        process = ForkedProcess(command, env=variables, stdout=full, stderr=subprocess.PIPE, text=True)
    errors = process.communicate()[1]
    run = tmp_path / "runs" / "tiny"
    assert process.returncode == 0, errors
    assert (run / "model" / "config.json").exists()
    assert (run / "loss.png").exists()
    assert "Model: " in (run / "train.log").read_text(encoding="utf-8")
    assert errors == "warning: standard output cannot be written: No space left on device; training continues\n"


@needs_full
def test_tools_say_that_standard_output_is_full(environment):
    """At once, or what Python still keeps when it ends."""
    for command, unbuffered in (("moreh-smi", ""), ("moreh-smi", "1"), ("moreh-switch-model 1", "")):
        variables = {**environment, "PYTHONUNBUFFERED": unbuffered}
        full = subprocess.run(
            ["sh", "-c", f"{command} >/dev/full"], capture_output=True, text=True, env=variables, check=False
        )
        assert (full.returncode, full.stderr) == (1, "error: standard output: No space left on device\n"), command
        closed = subprocess.run(
            ["sh", "-c", f"{command} >&-"], capture_output=True, text=True, env=variables, check=False
        )
        assert (closed.returncode, closed.stderr) == (0, "")


def test_figure_needs_no_backend(monkeypatch, tmp_path):
    monkeypatch.setenv("MPLBACKEND", "no such backend")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    new_figure().savefig(tmp_path / "a.png")
    assert os.environ["MPLBACKEND"] == "no such backend"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert plot.draw_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("limit", [50, 3000, 40_000])
def test_model_that_does_not_fit_the_disk_is_one_line(train, tmp_path, limit):
    """Whichever library meets the limit: the writer of safetensors, of tokenizers, or Python."""
    from utils.config.data_section import DataSection
    from utils.errors import UserError
    from utils.text.tokenizers import load_tokenizer
    from utils.training import save_model as module
    from utils.training.checkpoint.stopping import resume_command
    from utils.training.pretrained import load_pretrained

    directory = train("train.steps=1")
    model, tokenizer = load_pretrained(str(directory / "model"), "x"), load_tokenizer(str(directory / "model"))
    shutil.rmtree(directory / "model")
    data = DataSection(files=[str(tmp_path / "pairs.jsonl")])
    with files_of_at_most(limit), pytest.raises(UserError) as caught:
        module.save_model(model, tokenizer, data, directory / "model")
    assert "the model cannot be saved in" in str(caught.value)
    assert "File too large" in str(caught.value)
    assert resume_command() in str(caught.value)
    assert not [path for path in directory.iterdir() if "model" in path.name]


def test_checkpoint_that_has_no_room_is_said_and_tried_again(train, tmp_path, monkeypatch, capsys):
    """At the step after it, since the time until the next attempt is set to none; step 4 is due by the settings."""
    lacks = iter(["a checkpoint takes 2.00 GiB, and the disk has 1.00 GiB free"])
    needs = []

    def lack(directory, needed):
        needs.append(needed)
        return next(lacks, None)

    monkeypatch.setattr(checkpoints_module, "lack_of_space", lack)
    monkeypatch.setattr(checkpoints_module, "_RETRY_MINUTES", 0)
    directory = train("checkpoint.every_steps=2", "checkpoint.every_minutes=null", "checkpoint.keep_last=5")
    checkpoints = directory / "checkpoints"
    log = (directory / "train.log").read_text(encoding="utf-8")
    assert (
        f"warning: {checkpoints / 'step-2'} could not be saved: a checkpoint takes 2.00 GiB, and the disk has 1.00 GiB "
        "free; there is none yet; training continues" in log
    )
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-3", "step-4"]
    written = sum(path.stat().st_size for path in (checkpoints / "step-4").iterdir())
    assert len(set(needs)) == 1
    assert 0.5 < needs[0] / written < 1.05  # in a tiny checkpoint, the manifest has its share


def test_lack_of_space_is_told_with_both_figures(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.training.checkpoint.disk_space.free_bytes", lambda directory: 2**30)
    assert lack_of_space(tmp_path, 2**30) is None
    assert lack_of_space(tmp_path, 2**31) == "a checkpoint takes 2.00 GiB, and the disk has 1.00 GiB free"


def test_cache_that_may_not_fit_is_said_before_it_is_made(tiny_config, monkeypatch):
    config = load_config(str(tiny_config), [])
    usage = shutil.disk_usage(tiny_config.parent)
    monkeypatch.setattr("utils.data.dataset.shutil.disk_usage", lambda path: usage._replace(free=100))
    lines = []
    prepare(config, lines.append)
    assert any(line.startswith("warning: run.cache_directory: the tokenized data takes about ") for line in lines)
