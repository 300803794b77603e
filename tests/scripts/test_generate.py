"""generate.py: prompts from everywhere, sampling, streaming, and mistakes."""

import json
import shutil
import subprocess
import sys

import pytest


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
    process = subprocess.Popen(
        [sys.executable, "generate.py", str(checkpoint), "one two", "--echo"], env=environment, stdout=subprocess.PIPE
    )
    chunks = []
    while chunk := process.stdout.read1(65536):
        chunks.append(chunk)
    assert process.wait() == 0
    assert b"".join(chunks) == b"one two three four\n"
    assert len(chunks) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "x"], "error: the checkpoint: 'none' cannot be loaded"),
        (["{}", "x", "--file", "y"], "error: give the prompt on the command line or in --file, not both"),
        (["{}", "--file", "/no/such"], "error: --file: /no/such cannot be read"),
        (
            ["{}", "one", "--max-new-tokens", "100"],
            "error: the prompt has 1 tokens and 100 more are asked for, but the model",
        ),
        (["{}", "one", "--top-p", "0.5"], "need a --temperature above 0"),
        (["{}", "one", "--temperature", "-1"], "allowed is a number from 0.001 to 100"),
        (["{}", "one", "--temperature", "1", "--seed", str(2**64)], f"allowed is a whole number from 0 to {2**63 - 1}"),
        (["{}", "one", "--seed", "1"], "need a --temperature above 0"),
        (
            ["./no/such", "x"],
            "error: the checkpoint: there is no directory ./no/such: give one that holds a saved model",
        ),
    ],
)
def test_mistakes_give_one_line(run, checkpoint, arguments, message):
    finished = run(sys.executable, "generate.py", *[a.replace("{}", str(checkpoint)) for a in arguments])
    assert finished.returncode == 2
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr


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
    command = f"{sys.executable} generate.py {checkpoint} 'one two' --echo | true"
    assert subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True).stderr == ""
    closed = subprocess.run(
        ["sh", "-c", f"{sys.executable} generate.py {checkpoint} <&-"], env=environment, capture_output=True
    )
    assert closed.stderr.startswith(b"error: standard input is closed")


def test_generation_needs_no_accelerator_that_a_job_uses(run, checkpoint, environment, tmp_path):
    script = tmp_path / "busy.py"
    script.write_text(
        "import torch, time\ntorch.zeros(1).cuda()\nprint('ready', flush=True)\ntime.sleep(60)", encoding="utf-8"
    )
    busy = subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True)
    assert any(line == "ready\n" for line in busy.stdout)
    assert run(sys.executable, "generate.py", checkpoint, "one two").stdout == " three four\n"
    busy.kill()
    busy.wait()
