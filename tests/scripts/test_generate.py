"""generate.py: prompts from everywhere, sampling, streaming, and mistakes."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers.scripts.fork_server import ForkedProcess


@pytest.fixture
def run(run_forked):
    return run_forked


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model that has learnt one thing: what follows `one two`."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from utils.data.tokenization import train_tokenizer

    directory = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer(["one two three four"], 300)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=1, n_embd=32, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    ids = torch.tensor([[*tokenizer("one two three four")["input_ids"], 0]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_prompt_comes_from_command_line_file_or_standard_input(run, checkpoint, tmp_path):
    (tmp_path / "prompt.txt").write_text("one two", encoding="utf-8")
    answers = [
        run(sys.executable, "generate.py", checkpoint, "one two").stdout,
        run(sys.executable, "generate.py", checkpoint, "--file", tmp_path / "prompt.txt").stdout,
        run(sys.executable, "generate.py", checkpoint, input="one two").stdout,
    ]
    assert answers == [" three four\n"] * 3  # and it has learnt to stop


def test_sampling_is_repeatable_by_its_seed(run, checkpoint):
    def sample(seed):
        options = ["--temperature", "5", "--top-p", "0.99", "--top-k", "200", "--seed", seed, "--max-new-tokens", "20"]
        return run(sys.executable, "generate.py", checkpoint, "one", *options).stdout

    assert sample("1") == sample("1") != sample("2")


def test_answer_is_streamed(environment, checkpoint):
    process = ForkedProcess(
        [sys.executable, "generate.py", str(checkpoint), "one two", "--echo"], env=environment, stdout=subprocess.PIPE
    )
    chunks = []
    while chunk := process.stdout.read1(65536):
        chunks.append(chunk)
    assert process.wait() == 0
    assert b"".join(chunks) == b"one two three four\n"
    assert len(chunks) > 1


def test_directory_of_a_run_suggests_its_model(run, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "run" / "model")
    errors = run(sys.executable, "generate.py", tmp_path / "run", "x").stderr
    assert errors.endswith(f"which has no config.json; did you mean {tmp_path / 'run' / 'model'}?\n")


@pytest.mark.parametrize(
    ("key", "value", "lacking"),
    [
        ("n_layer", 2, "transformer.h.1.attn.c_attn.bias is not in its files"),
        ("vocab_size", 999, "by its configuration"),
    ],
)
def test_weights_of_another_model_are_refused(run, checkpoint, tmp_path, key, value, lacking):
    """transformers draws what is missing at random."""
    directory = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    assert config[key] != value
    (directory / "config.json").write_text(json.dumps(config | {key: value}), encoding="utf-8")
    finished = run(sys.executable, "generate.py", directory, "one")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "its config.json is of another model than its weights" in finished.stderr
    assert lacking in finished.stderr


def test_closed_pipes_end_in_silence_or_one_line(environment, checkpoint):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "generate.py", checkpoint, "one two", "--echo"]
    process = ForkedProcess(command, env=environment, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert process.communicate()[1] == b""
    closed = subprocess.run(
        ["sh", "-c", f"{sys.executable} generate.py {checkpoint} <&-"], env=environment, capture_output=True
    )
    assert closed.stderr.startswith(b"error: standard input is closed")


def test_generation_needs_no_accelerator_that_a_job_uses(run, checkpoint, environment, tmp_path):
    script = tmp_path / "busy.py"
    script.write_text(
        "import torch, time\ntorch.zeros(1).cuda()\nprint('ready', flush=True)\ntime.sleep(60)", encoding="utf-8"
    )
    busy = ForkedProcess([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True)
    assert any(line == "ready\n" for line in busy.stdout)
    assert run(sys.executable, "generate.py", checkpoint, "one two").stdout == " three four\n"
    busy.kill()
    busy.wait()


@pytest.fixture(scope="module")
def chat_checkpoint(tmp_path_factory):
    """A tiny model that has learned 50 conversations of one question each."""
    import torch

    from tests.helpers.scripts.tiny_runs import prepare
    from utils.config.schema import Config
    from utils.data.batches import iter_steps, training_loader
    from utils.text.template import save_template
    from utils.training.model import load_model

    directory = tmp_path_factory.mktemp("chat")
    chats = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for number in range(25)
        for question, answer in ((f"Is {number} a number?", "Yes."), (f"Is x{number} a word?", "No, it is not."))
    ]
    (directory / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    config = Config.model_validate(
        {
            "run": {"name": "chat", "cache_directory": str(directory / "cache")},
            "model": {
                "architecture": {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 64}
            },
            "tokenizer": {"vocabulary_size": 320},
            "data": {"files": [str(directory / "chats.jsonl")], "format": "chat", "max_length": 32, "eval_rows": 1},
            "train": {"steps": 120, "batch_size": 16},
        }
    )
    data = prepare(config)
    torch.manual_seed(0)
    model = load_model(config, data.tokenizer)
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _, (batch,) in iter_steps(training_loader(data, config), 1, 120, 0):
        model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory / "model")
    data.tokenizer.save_pretrained(directory / "model")
    save_template(config.data, directory / "model")
    return directory / "model"


def test_chat_stops_by_itself_and_keeps_the_history(run, chat_checkpoint):
    talk = run(
        sys.executable, "generate.py", chat_checkpoint, "--chat", input="Is 7 a number?\n\n/reset\nIs x23 a word?\n"
    )
    assert talk.stdout == "Yes.\nNo, it is not.\n"
    speeds = [line for line in talk.stderr.splitlines() if "tokens/s" in line]
    assert len(speeds) == 2
    assert "cut at" not in talk.stderr  # the model has ended its turns itself
    assert "The conversation begins anew." in talk.stderr


def test_one_question_is_asked_in_the_chat_template(run, chat_checkpoint):
    assert run(sys.executable, "generate.py", chat_checkpoint, "Is 7 a number?").stdout == "Yes.\n"
    shown = run(sys.executable, "generate.py", chat_checkpoint, "Is 7 a number?", "--echo").stdout
    assert shown == "<|im_start|>user\nIs 7 a number?<|im_end|>\n<|im_start|>assistant\nYes.\n"


def test_chat_that_grows_too_long_goes_on_after_a_reset(run, chat_checkpoint):
    lines = "".join("Is 7 a number?\n" for _ in range(6)) + "/reset\nIs x8 a word?\n"
    talk = run(sys.executable, "generate.py", chat_checkpoint, "--chat", input=lines)
    assert "error: the prompt has" in talk.stderr
    assert "/reset begins a new conversation" in talk.stderr
    assert talk.stdout.endswith("\nNo, it is not.\n")


def test_chat_needs_a_chat_template(run, checkpoint):
    refused = run(sys.executable, "generate.py", checkpoint, "--chat", input="one\n")
    assert "error: the tokenizer has no chat template" in refused.stderr
    refused = run(sys.executable, "generate.py", checkpoint, "one", "--system", "s")
    assert "error: --system: the checkpoint was not trained on conversations" in refused.stderr
    refused = run(sys.executable, "generate.py", checkpoint, "one", "--chat")
    assert "--chat reads its messages from standard input" in refused.stderr
