"""Mistakes in a settings file give one clear line that says where they are. See tests/bad_input for a table of more."""

import re
import sys

import pytest

import train_gpt
from tests.conftest import ROOT
from utils.cli import run_script
from utils.config.yaml_file import load_config, save_config
from utils.errors import UserError


@pytest.fixture
def script(tiny_config, monkeypatch, capsys):
    """Run train_gpt.py with a command line; returns exit code and the lines on standard error."""

    def run(*arguments, config=tiny_config):
        monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--config", str(config), *arguments])
        code = run_script(
            train_gpt.main, train_gpt.make_pair, train_gpt.make_example, default_config="", description=None
        )
        return code, capsys.readouterr().err.splitlines()

    return run


def changed(config, old, new):
    """The settings file with one text replaced."""
    text = config.read_text(encoding="utf-8")
    assert text.count(old) == 1
    config.write_text(text.replace(old, new), encoding="utf-8")


# What is replaced in the settings file, what replaces it, and the line that the user reads (the file's name for its path).
BAD_SETTINGS = {
    "unknown key": ("lr: 1.0e-3", "lrr: 1.0e-3", "tiny.yaml:9: train.lrr: unknown key; did you mean lr? Allowed here: steps,"),
    "unknown section": ("log: {", "logs: {", "tiny.yaml:10: logs: unknown key; did you mean log? Allowed here: run,"),
    "empty section": ("log: {", "'': {", "tiny.yaml:10: '': unknown key. Allowed here: run,"),
    "missing section": ("run: {name", "#run: {name", "tiny.yaml: run: this key is missing"),
    "missing key": ("{name: tiny, ", "{", "tiny.yaml:2: run.name: this key is missing"),
    "text for a number": ("lr: 1.0e-3", "lr: fast", "tiny.yaml:9: train.lr: 'fast' is not allowed: input should be a valid number"),
    "number as a text": ("steps: 4", 'steps: "4"', "tiny.yaml:9: train.steps: '4' is not allowed: input should be a valid integer"),
    "part of a step": ("steps: 4", "steps: 4.5", "tiny.yaml:9: train.steps: 4.5 is not allowed: "),
    "negative": ("batch_size: 8", "batch_size: -8", "train.batch_size: -8 is not allowed: input should be greater than or equal to 1"),
    "infinite": ("lr: 1.0e-3", "lr: .inf", "train.lr: inf is not allowed: input should be a finite number"),
    "not a choice": ("max_length: 48", "max_length: 48, too_long: cut", "data.too_long: 'cut' is not allowed: input should be 'truncate' or"),
    "steps and epochs": ("steps: 4", "steps: 4, epochs: 1", "tiny.yaml:9: train: give exactly one of steps and epochs"),
    "warm-up too long": ("steps: 4", "steps: 4, warmup_steps: 5", "train: warmup_steps is 5, but there are only 4 steps"),
    "name with a slash": ("name: tiny", "name: a/b", "tiny.yaml:2: run.name: 'a/b' is not allowed: "),
    "unknown model type": ("gpt2,", "gpt7,", "model.architecture.model_type: 'gpt7' is not a type that transformers knows; did you mean"),
    "unknown model key": ("n_layer", "n_layers", "tiny.yaml:5: model.architecture.n_layers: model_type gpt2 has no such key; did you mean n_layer?"),
    "heads do not divide": ("n_head: 2", "n_head: 3", "model.architecture: ValueError: `embed_dim` must be divisible by num_heads"),
    "too few positions": ("n_positions: 64", "n_positions: 16", "model.architecture: the model has 16 positions, fewer than data.max_length=48"),
    "no such model": ("architecture: {model_type: gpt2, n_layer: 1, n_embd: 32, n_head: 2, n_positions: 64,", "pretrained: no/such\n  #", None),
    "template without prompt": ("max_length: 48", "max_length: 48, template: x", "data.template: the template must contain {prompt}"),
    "template with a format": ("max_length: 48", 'max_length: 48, template: "{prompt:d}"', "data.template: '{prompt:d}': only names of fields"),
    "template with an open brace": ("max_length: 48", 'max_length: 48, template: "{prompt} {"', "data.template: '{prompt} {' is not a template: "),
    "template that names no field": ("max_length: 48", 'max_length: 48, template: "{{prompt}}"', "data.template: the template must contain {prompt}"),
    "key that is a list": ("steps: 4", "? [a, b] : 1, steps: 4", "tiny.yaml:9: a key must be a word"),
    "text for a model's number": ("n_layer: 1", "n_layer: two", "model.architecture: "),
    "unknown activation": ("n_layer: 1", "n_layer: 1, activation_function: foo", "model.architecture: KeyError: 'foo'"),
    "two sources": ("max_length: 48", "max_length: 48, hub: some/data", "data: give exactly one of docstrings, summaries, files, hub and sources; given: files, hub"),
    "no such file": ("pairs.jsonl", "other.jsonl", "there is no file "),
    "bad option of the hook": ("null}", "{num_stages: 0}}", "accelerator.advanced_parallelization.num_stages: 0 is not allowed: "),
    "stages without pipeline": ("null}", "{num_stages: 4, pipeline_parallel: false}}", "stages need pipeline_parallel=True"),
    "unknown accelerator": ("advanced_parallelization: null", "model: Huge, advanced_parallelization: null", "no model 'Huge': give a number"),
    "key given twice": ("steps: 4", "steps: 4, steps: 5", "tiny.yaml:9: train.steps: this key is already given in line 9"),
    "impossible date": ("name: tiny", "name: 2024-13-45", "tiny.yaml: not valid YAML: month must be in 1..12"),
    "key that is not a string": ("steps: 4", "1: 4", "tiny.yaml:9: train.1: "),
    "not YAML": ("steps: 4", "steps: [4", "tiny.yaml:9: not valid YAML: "),
    "too many held out": ("eval_rows: 8", "eval_rows: 40", "data.eval_rows: 40 rows are requested, but the data has only 40"),
    "batch larger than the data": ("batch_size: 8", "batch_size: 33", "train.batch_size: a batch takes 33 rows, but there are 32"),
    "unknown packages": ("files: [", "docstrings: [no_such_package] #", "there is no installed package 'no_such_package'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_wrong_settings_file_gives_one_line(script, tiny_config, case):
    old, new, expected = BAD_SETTINGS[case]
    if case == "no such model":
        text = tiny_config.read_text(encoding="utf-8")
        start, end = text.index("model:\n"), text.index("data:")
        tiny_config.write_text(text[:start] + "model: {pretrained: no/such}\n" + text[end:], encoding="utf-8")
        expected = "the tokenizer of 'no/such' cannot be loaded: "
    elif case == "unknown packages":
        text = re.sub(r"files: \[.*?\]", "docstrings: [no_such_package]", tiny_config.read_text(encoding="utf-8"))
        tiny_config.write_text(text, encoding="utf-8")
    else:
        changed(tiny_config, old, new)
    code, lines = script()
    assert code == 2
    assert len(lines) == 1, lines
    assert expected in lines[0].replace(str(tiny_config), "tiny.yaml")
    assert lines[0].startswith("error: ")


def test_all_problems_come_at_once(script, tiny_config):
    changed(tiny_config, "lr: 1.0e-3", "lrr: 1.0e-3")
    changed(tiny_config, "max_length: 48", "max_length: 1")
    code, lines = script("run.name=", "log.every_steps=0")
    assert code == 2
    keys = [line.removeprefix("error: ").split(": ")[1] for line in lines]
    assert sorted(keys) == ["data.max_length", "log.every_steps", "run.name", "train.lrr"]
    assert sum(line.startswith("error: command line: ") for line in lines) == 2


@pytest.mark.parametrize(
    ("name", "content"), [("none.yaml", None), ("list.yaml", "- a"), ("empty.yaml", ""), ("bytes.yaml", b"\xff")]
)
def test_file_that_is_no_settings_file_is_named(script, tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, lines = script(config=path)
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {path}")


def test_directory_that_cannot_be_made_is_named(script, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    code, lines = script(f"run.directory={tmp_path / 'file'}")
    assert code == 2
    assert len(lines) == 1
    assert "run.directory: " in lines[0]


def test_overrides_may_stand_on_both_sides_of_an_option(script):
    _, lines = script("train.x=1", "--resume", "auto", "train.y=1")
    assert [line.split(": unknown")[0] for line in lines] == [
        "error: command line: train.x",
        "error: command line: train.y",
    ]


def test_traceback_is_shown_with_debug(script):
    with pytest.raises(UserError, match="unknown key"):
        script("--debug", "train.x=1")


def test_script_ends_with_exit_code_2(run, tiny_config):
    finished = run(sys.executable, "train_gpt.py", "--config", tiny_config, "train.stepz=3")
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith(
        "error: command line: train.stepz: unknown key; did you mean steps? Allowed here: steps, epochs,"
    )


def test_settings_survive_being_saved(tmp_path, tiny_config):
    config = load_config(str(tiny_config), ["train.lr=1e-4", "accelerator.advanced_parallelization={num_stages: auto}"])
    assert config.train.lr == 1e-4
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(str(tmp_path / "saved.yaml"), []) == config
    pretrained = load_config(str(tiny_config), ["model={pretrained: x}", "tokenizer={}", 'run.name="1e-4"'])
    save_config(pretrained, tmp_path / "saved.yaml")
    assert load_config(str(tmp_path / "saved.yaml"), []) == pretrained


@pytest.mark.parametrize("name", ["gpt", "gpt_13b"])
def test_settings_of_the_project_can_be_loaded(name):
    assert load_config(str(ROOT / "configs" / f"{name}.yaml"), []).run.name == name
