"""Going on from a checkpoint: after going back, after a fault, with other settings or data; and the end of a run."""

import errno
import json
import os
import pickle
import shutil
import sys

import pytest

import train_gpt
from moreh.runtime.checkpoint import manifest
from moreh.runtime.checkpoint.manifest import Manifest, write_manifest
from tests.conftest import TINY_CONFIG
from utils.cli import run_script
from utils.config.schema import TrainSection
from utils.training.checkpoint.files import prune, set_aside
from utils.training.lr_schedule import lr_factor

STEPS = 8


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished run with a checkpoint and an evaluation every second step."""
    directory = tmp_path_factory.mktemp("base")
    rows = [{"prompt": f"def add_{i}(x):\n", "response": f"    return x{' + 1' * (i % 7)} + {i}\n"} for i in range(40)]
    data = directory / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = TINY_CONFIG.format(directory=directory / "runs", data=data).replace("steps: 4", f"steps: {STEPS}")
    text = text.replace("sample_tokens: 4", "sample_tokens: 0, eval_every_steps: 2")
    (directory / "tiny.yaml").write_text(
        text + "checkpoint: {every_steps: 2, keep_last: 9, every_minutes: null}\n", encoding="utf-8"
    )
    assert run(directory / "tiny.yaml") == 0
    return directory


def run(config, *arguments):
    """Run train_gpt.py in this process; returns the exit code."""
    before, sys.argv = sys.argv, ["train_gpt.py", "--config", str(config), *map(str, arguments)]
    try:
        main, task = train_gpt.main, (train_gpt.make_pair, train_gpt.make_example)
        return run_script(main, *task, default_config="", description=None)
    finally:
        sys.argv = before


@pytest.fixture
def script(base, tmp_path, capsys):
    """Run the script on a copy of that run; returns the exit code and the lines of standard output and error."""
    shutil.copytree(base / "runs" / "tiny", tmp_path / "tiny")

    def go_on(*arguments):
        capsys.readouterr()
        code = run(base / "tiny.yaml", f"run.directory={tmp_path}", *arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return go_on


@pytest.fixture
def checkpoints(tmp_path):
    """The names in the directory of checkpoints, in order."""
    return lambda: sorted(path.name for path in (tmp_path / "tiny" / "checkpoints").iterdir())


def metrics_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_going_back_sets_the_later_checkpoints_aside(script, base, tmp_path, checkpoints, read_metrics):
    """What is written after going back is kept, and "auto" goes on from it; the end is that of the run left alone."""
    code, out, _ = script("--resume", tmp_path / "tiny" / "checkpoints" / "step-2", "train.steps=4")
    assert code == 0
    assert "Renamed step-6 of the earlier run to" in out
    later = [f"step-{step}.abandoned-1" for step in (4, 6, 8)]
    assert checkpoints() == sorted(["step-2", "step-4", *later])
    code, out, _ = script("--resume", "auto", "checkpoint.keep_last=2", "checkpoint.keep_best=false")
    assert code == 0
    assert f"[Step 4/{STEPS}] | Resumed from" in out
    assert checkpoints() == sorted(["step-6", "step-8", *later])


def test_crash_loop_keeps_as_many_as_the_settings_say(script, checkpoints, tmp_path):
    """A process that is killed before it removes the older ones leaves that to the next."""
    (tmp_path / "tiny" / "checkpoints" / ".step-10-unfinished").mkdir()
    code, _, _ = script("--resume", "auto", "checkpoint.keep_last=1", "checkpoint.keep_best=false")
    assert code == 0
    assert checkpoints() == ["step-8"]


def test_damaged_checkpoint_is_named_and_the_one_before_is_resumed(script, base, checkpoints, tmp_path):
    newest = tmp_path / "tiny" / "checkpoints" / "step-8"
    with (newest / "__0_0.distcp").open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 4]))
    code, _, err = script("--resume", newest)
    assert code == 2
    assert len(err) == 1
    assert f"{newest / '__0_0.distcp'} is damaged: its checksum is" in err[0]
    code, out, _ = script("--resume", "auto")
    assert code == 0
    assert f"[Step 6/{STEPS}] | Resumed from" in out
    log = (tmp_path / "tiny" / "train.log").read_text(encoding="utf-8")
    assert f"Not resumed: {newest / '__0_0.distcp'} is damaged" in log
    assert {"step-6", "step-8", "step-8.damaged-1"} <= set(checkpoints())
    expected = metrics_of(base / "runs" / "tiny")[-1]
    assert metrics_of(tmp_path / "tiny")[-1]["loss"] == expected["loss"]

    for checkpoint in (tmp_path / "tiny" / "checkpoints").glob("step-?"):
        (checkpoint / ".metadata").unlink()
    code, _, err = script("--resume", "auto")
    assert code == 2
    assert all(".metadata is damaged: it is missing" in line for line in err)


def test_files_of_another_step_are_noticed(script, tmp_path):
    directory = tmp_path / "tiny" / "checkpoints"
    shutil.rmtree(directory / "step-8")
    shutil.copytree(directory / "step-2", directory / "step-8")
    code, _, err = script("--resume", directory / "step-8")
    assert code == 2
    assert "is of another checkpoint: it says step 2" in err[0]


def test_settings_that_make_another_training_are_refused(script, checkpoints):
    before = checkpoints()
    code, _, err = script(
        "--resume", "auto", "train.seed=1", "train.batch_size=4", "model.architecture.n_head=4", "train.lr=1e-4"
    )
    assert code == 2
    assert len(err) == 2
    for change in ("train.seed 0 -> 1", "train.batch_size 8 -> 4", "model.architecture.n_head 2 -> 4"):
        assert change in err[0]
    assert "resume nevertheless with --resume-force" in err[0]
    assert "train.lr 0.001 -> 0.0001" in err[1]
    assert err[1].endswith("--resume-with train.lr=0.0001")
    assert checkpoints() == before


def test_changed_data_is_refused(script, base, tmp_path):
    """One row is mended: the tokenizer is trained anew, and other rows are held out."""
    data = tmp_path / "pairs.jsonl"
    rows = (base / "pairs.jsonl").read_text(encoding="utf-8")
    data.write_text(rows.replace("+ 39", "+ thirty_nine"), encoding="utf-8")
    code, _, err = script("--resume", "auto", f"data.files=[{data}]")
    assert code == 2
    assert len(err) == 1
    assert "content.training_rows " in err[0]
    assert "content.tokenizer " in err[0]
    data.write_text(rows, encoding="utf-8")  # the same rows in another file
    code, out, _ = script("--resume", "auto", f"data.files=[{data}]")
    assert code == 0
    assert "data.files " in out


def test_changes_that_are_named_are_shown_and_obeyed(script, tmp_path):
    code, out, _ = script(
        "--resume", tmp_path / "tiny" / "checkpoints" / "step-4", "--resume-with", "train.lr=5e-4", "log.every_steps=1",
        "train.weight_decay=0.2", "--resume-with", "train.weight_decay=0.2",
    )  # fmt: skip
    assert code == 0
    table = out[out.index("Differences from the checkpoint:") :].splitlines()
    cells = [line.split() for line in table[1:6]]
    assert ["setting", "checkpoint", "now"] in cells
    assert ["train.lr", "0.001", "0.0005"] in cells
    assert ["log.every_steps", "2", "1"] in cells
    for line in metrics_of(tmp_path / "tiny")[1:]:
        factor = lr_factor(line["step"], STEPS, TrainSection(steps=STEPS))
        assert line["lr"] == (1e-3 if line["step"] <= 4 else 5e-4) * factor


def test_forced_training_goes_on(script):
    code, out, _ = script("--resume", "auto", "--resume-force", "train.seed=1", "train.steps=9")
    assert code == 0
    assert ["train.seed", "0", "1"] in [line.split() for line in out.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", ""], "--resume: '' is not a checkpoint: give auto"),
        (["--resume-with", "train.lr=1"], "--resume-with applies only to a resumed run"),
        (["--resume-force"], "--resume-force applies only to a resumed run"),
        (["--resume", "auto", "--resume-with", "train.seed=1"], "write key=value with one of train.lr, train.schedule"),
    ],
)
def test_options_of_resuming_that_say_nothing_are_refused(script, tmp_path, arguments, message):
    code, _, err = script(*arguments)
    assert code == 2
    assert len(err) == 1
    assert message in err[0]
    assert (tmp_path / "tiny").is_dir()
    assert not (tmp_path / "tiny.1").exists()


def test_finished_run_evaluates_and_saves_its_model(script, tmp_path, base):
    shutil.rmtree(tmp_path / "tiny" / "model")
    (tmp_path / ".model-unfinished").mkdir()
    code, out, _ = script("--resume", "auto")
    assert code == 0
    assert f"All {STEPS} steps are done" in out
    assert "Held-out loss: " in out
    saved, expected = (directory / "model" for directory in (tmp_path / "tiny", base / "runs" / "tiny"))
    assert {path.name for path in saved.iterdir()} == {path.name for path in expected.iterdir()}
    assert (saved / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert metrics_of(tmp_path / "tiny") == metrics_of(base / "runs" / "tiny")


def test_failed_save_is_a_line_and_the_training_goes_on(base, script, checkpoints, monkeypatch, tmp_path):
    failed = []

    class FullFile(manifest.io.FileIO):
        def write(self, data):
            if "step-4" in str(self.name):
                failed.append(self.name)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr(manifest.io, "FileIO", FullFile)
    code, _, err = script("--resume", tmp_path / "tiny" / "checkpoints" / "step-2")
    assert code == 0
    assert failed
    directory = tmp_path / "tiny" / "checkpoints"
    assert (
        f"warning: {directory / 'step-4'} could not be saved: No space left on device; the last one is "
        f"{directory / 'step-2'}; training continues" in (tmp_path / "tiny" / "train.log").read_text(encoding="utf-8")
    )
    assert err == []
    assert [name for name in checkpoints() if "." not in name] == ["step-2", "step-6", "step-8"]


def test_model_and_tokenizer_appear_together(script, tmp_path, monkeypatch):
    shutil.rmtree(tmp_path / "tiny" / "model")

    def full(data, directory):
        assert (directory / "model.safetensors").exists()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("utils.training.save_model.save_template", full)
    code, _, err = script("--resume", "auto")
    assert code == 2
    assert "the model cannot be saved" in err[0]
    assert "No space left on device" in err[0]
    assert not [path.name for path in (tmp_path / "tiny").iterdir() if "model" in path.name]


def test_model_without_tokenizer_is_refused(base, script, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(base / "runs" / "tiny" / "model", model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    code, _, err = script("run.name=next", f"model={{pretrained: {model}}}", "tokenizer={}")
    assert code == 2
    assert len(err) == 1
    assert "the tokenizer of" in err[0]
    assert "there is none in it" in err[0]


class Evil:
    """An object whose pickle makes a directory when it is read."""

    def __init__(self, path):
        self._path = str(path)

    def __reduce__(self):
        return os.mkdir, (self._path,)


def test_malicious_settings_and_weights_run_nothing(base, script, tmp_path, monkeypatch):
    proof, model = tmp_path / "ran", tmp_path / "model"
    settings = tmp_path / "evil.yaml"
    settings.write_text(f"run: !!python/object/apply:os.mkdir ['{proof}']\n", encoding="utf-8")
    assert run(settings) == 2
    shutil.copytree(base / "runs" / "tiny" / "model", model)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(proof)))
    code, _, err = script("run.name=next", f"model={{pretrained: {model}}}", "tokenizer={}")
    assert code == 2
    assert len(err) == 1
    assert not proof.exists()


def test_best_and_last_checkpoints_are_kept(tmp_path):
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0)):
        (tmp_path / f"step-{step}").mkdir()
        write_manifest(tmp_path / f"step-{step}", Manifest({}, {"script": {"eval_loss": loss}}))
    set_aside(tmp_path / "step-4", "abandoned")
    (tmp_path / "step-4").mkdir()
    assert set_aside(tmp_path / "step-4", "abandoned").name == "step-4.abandoned-2"
    prune(tmp_path, 1, keep_best=True)
    aside = ["step-4.abandoned-1", "step-4.abandoned-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-3", *aside]
    prune(tmp_path, 1, keep_best=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3", *aside]
