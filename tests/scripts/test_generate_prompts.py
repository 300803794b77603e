"""generate.py: what becomes of a prompt on its way to the model, and of the answer on its way to the console."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.conftest import ROOT
from tests.helpers.scripts.tiny_tokenizers import chat_tokenizer, sentencepiece_tokenizer
from utils.config.schema import DataSection
from utils.text.encoding import encode_continuations, encode_prompts
from utils.text.template import fill_template, save_template

ANSWER = "    return x\n    y"


@pytest.fixture
def run(run_forked):
    return run_forked


def save_parrot(directory, tokenizer, prompt, answer, **settings):
    """Save a tiny model that has learnt one answer to one prompt, in the template of some settings."""
    data = DataSection(hub="x", **settings)
    prompt = fill_template(data.template, {"prompt": prompt, "input": ""})
    (prompt_ids,), (answer_ids,) = encode_prompts([prompt], tokenizer), encode_continuations([answer], tokenizer)
    ids = torch.tensor([[*prompt_ids, *answer_ids, tokenizer.eos_token_id]])
    labels = ids.clone()
    labels[:, : len(prompt_ids)] = -100
    torch.manual_seed(0)
    size = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": 300}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=1, eos_token_id=250))  # 250: what never comes
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    save_template(data, directory)
    return directory


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    """A model of Llama 2's kind of tokenizer that was trained with a template of two fields."""
    template = {"template": "Say {input}two: {prompt}\nthree:\n"}
    return save_parrot(tmp_path_factory.mktemp("parrot"), sentencepiece_tokenizer(), "f(x)\ny", ANSWER, **template)


@pytest.fixture
def ask(run, parrot):
    """What the model answers, without the line break that ends the output."""

    def ask_model(*arguments, checkpoint=parrot, **options):
        finished = run(sys.executable, "generate.py", checkpoint, *arguments, **options)
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.endswith("\n")
        return finished.stdout[:-1]

    return ask_model


def test_answer_is_what_was_trained_character_for_character_and_ends_there(ask):
    assert ask(r"f(x)\ny") == ANSWER
    assert ask(r"f(x)\ny", "--echo") == "Say two: f(x)\ny\nthree:\n" + ANSWER


def test_template_is_put_to_the_question_once(run, ask, parrot):
    whole = "Say two: f(x)\ny\nthree:\n"
    assert ask(whole) == ask(whole, "--raw") == ask(r"f(x)\ny", "--field", "input=") == ANSWER
    assert ask(r"f(x)\ny", "--raw", "--max-new-tokens", "8") != ANSWER[:8]
    assert ask(r"f(x)\ny", "--echo", "--field", "input=a ", "--max-new-tokens", "1").startswith("Say a two: f(x)")
    finished = run(sys.executable, "generate.py", parrot, "x", "--field", "other=1")
    assert (finished.returncode, finished.stderr) == (
        2,
        "error: --field other: the model's template has no such field; it has input\n",
    )


def test_file_and_standard_input_are_read_as_data_files_are(run, ask, parrot, tmp_path):
    content = "\ufefff(x)\r\ny".encode()
    (tmp_path / "prompt.txt").write_bytes(content)
    assert ask("--file", tmp_path / "prompt.txt") == ANSWER
    command = [sys.executable, "generate.py", parrot]
    assert run(*command, input=content).stdout == ANSWER + "\n"
    (tmp_path / "prompt.txt").write_bytes("café".encode("latin-1"))
    finished = run(*command, "--file", tmp_path / "prompt.txt")
    assert "prompt.txt cannot be read: not UTF-8 text: byte 3 is 0xe9" in finished.stderr
    piped = run(*command, input="café".encode("latin-1"))
    assert piped.returncode == 2
    assert "error: standard input cannot be read: not UTF-8 text: byte 3 is 0xe9" in piped.stderr


def test_options_may_stand_between_the_arguments(ask):
    assert ask("--max-new-tokens", "30", r"f(x)\ny") == ANSWER
    assert ask("--echo", r"f(x)\ny", "--max-new-tokens", "30").endswith(ANSWER)


def test_prompt_that_is_not_utf_8_gives_one_line(environment, parrot):
    command = [sys.executable, "generate.py", str(parrot), b"caf\xe9"]
    finished = subprocess.run(command, env={**environment, "PYTHONUTF8": "1"}, capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: the prompt is not UTF-8 text: it has the byte 0xe9: ")
    assert len(finished.stderr.splitlines()) == 1


def test_console_without_a_character_shows_its_code(environment, tmp_path):
    directory = save_parrot(tmp_path / "parrot", chat_tokenizer(), "x", "é → 😀")
    command = [sys.executable, "generate.py", str(directory), "x"]
    finished = subprocess.run(command, env={**environment, "PYTHONIOENCODING": "cp1252"}, capture_output=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.decode("cp1252") == "é \\u2192 \\U0001f600" + os.linesep


def test_paths_begin_at_home(ask, parrot, tmp_path):
    (tmp_path / "mine").symlink_to(parrot)
    (tmp_path / "prompt.txt").write_text("f(x)\ny", encoding="utf-8")
    assert ask("--file=~/prompt.txt", checkpoint="~/mine", HOME=str(tmp_path)) == ANSWER


def test_run_saves_its_template_and_end_token(train, tiny_rows, tmp_path, capsys):
    """A chat template that training did not use is not saved, and an end token of the settings ends what follows."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}!"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    directory = train(
        f"tokenizer={{pretrained: {tmp_path / 'tokenizer'}}}",
        "data.template=Q: {prompt}\nA: ",
        "data.end_token=<|im_end|>",
        "data.max_length=64",
    )
    saved = directory / "model"
    assert json.loads((saved / "prompt_template.json").read_text(encoding="utf-8")) == {
        "template": "Q: {prompt}\nA: ",
        "control_tokens": "text",
    }
    assert json.loads((saved / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"] == 4
    assert json.loads((saved / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"] == "<|im_end|>"
    assert not (saved / "chat_template.jinja").exists()
    assert "The tokenizer's chat template is not saved" in capsys.readouterr().out


def test_saved_settings_of_a_resumed_run_start_anew(train, tiny_config, tmp_path, monkeypatch):
    import train_gpt
    from utils.cli import run_script

    train("train.steps=2", "checkpoint.every_steps=2")
    directory = train("checkpoint.resume=auto")
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--config", str(directory / "config.yaml")])
    assert (
        run_script(train_gpt.main, train_gpt.make_pair, train_gpt.make_example, default_config="", description=None)
        == 0
    )
    assert (directory.with_name("tiny.1") / "checkpoints").is_dir()


@pytest.mark.parametrize("script", ["generate.py", "scripts/export.py", "scripts/fetch_smollm2.py"])
def test_help_imports_neither_torch_nor_transformers(run_process, script):
    source = (
        "import atexit, runpy, sys; sys.argv = [sys.argv[1], '--help']; "
        "atexit.register(lambda: print('imported:', {'torch', 'transformers'} & set(sys.modules))); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    assert "imported: set()\n" in run_process(sys.executable, "-c", source, script, cwd=ROOT).stdout
