"""Runs on conversations: from the sources of a package to a model that is asked."""

import json
import sys

import pytest

from utils.text.template import load_template


@pytest.fixture
def run(run_forked):
    return run_forked


@pytest.fixture
def chats(run, tmp_path):
    """Conversations about the functions of Python's email package."""
    path = tmp_path / "data" / "chats.jsonl"
    written = run(sys.executable, "scripts/docstring_chats.py", path, "email", "json")
    assert written.returncode == 0, written.stderr
    assert written.stdout == f"{len(path.read_text().splitlines())} conversations: {path}\n"
    return path


def test_conversations_have_the_first_line_and_the_call(chats):
    rows = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    assert len(rows) > 10
    (row,) = [row for row in rows if row[1]["content"] == "What does utils.formataddr do?"]
    assert [message["role"] for message in row] == ["system", "user", "assistant", "user", "assistant"]
    assert row[2]["content"].startswith("The inverse of parseaddr()")
    assert row[4]["content"] == "utils.formataddr(pair, charset='utf-8')"


def test_run_on_conversations_saves_a_model_that_answers(run, chats, tiny_config, tmp_path):
    data = f"data={{files: [{chats}], format: chat, max_length: 256, too_long: drop, eval_rows: 4}}"
    settings = [
        data,
        "train.batch_size=2",
        "train.steps=2",
        "log.sample_tokens=4",
        "model.architecture.n_positions=256",
    ]
    shown = run(sys.executable, "train_gpt.py", "--config", tiny_config, *settings, "--show-rows", "1")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("\u27e6") == 3  # in the line above the rows, and around the two answers
    assert not (tmp_path / "runs" / "tiny").exists()

    finished = run(sys.executable, "train_gpt.py", "--config", tiny_config, *settings)
    assert finished.returncode == 0, finished.stderr
    model = tmp_path / "runs" / "tiny" / "model"
    assert load_template(str(model)) == "chat"
    assert "<|im_start|>" in (model / "chat_template.jinja").read_text()
    talk = run(sys.executable, "generate.py", model, "--chat", "--max-new-tokens", "3", input="Hello?\n")
    assert talk.returncode == 0, talk.stderr
    assert "3 tokens, " in talk.stderr
