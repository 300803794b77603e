"""The tokenized data of a run and its cache: what is prepared once, what makes it anew, and who has seen which rows."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import train_gpt
from tests.helpers.scripts.tiny_runs import prepare
from utils.config.yaml_file import load_config
from utils.data.batches import training_loader
from utils.data.cache import make_once, write_atomically
from utils.data.dataset import prepare_data
from utils.data.tokenization import train_tokenizer
from utils.errors import UserError


def cache_line(config, prepare=prepare):
    """The line of the log that names the directory of the cache."""
    lines = []
    prepare(config, lines.append)
    return next(line for line in lines if line.startswith("Tokenized data: "))


def test_data_is_tokenized_once(tiny_config, monkeypatch):
    config = load_config(str(tiny_config), [])
    lines = []
    first = prepare(config, lines.append)
    assert any("Reading and tokenizing" in line for line in lines)
    monkeypatch.setattr("utils.data.dataset.source_records", None)  # would fail if it were called
    again = prepare(config, lines.append)
    assert first.train.to_list() == again.train.to_list()
    assert first.evaluation.to_list() == again.evaluation.to_list()
    assert first.train_counts == again.train_counts
    held_out = {row["location"] for row in first.evaluation}
    assert len(held_out) == 8
    assert held_out.isdisjoint(row["location"] for row in first.train)


def test_cache_follows_the_settings_and_the_files(tiny_config):
    changes = ("data.max_length=40", "data.loss_on=all", "train.seed=1", "tokenizer.vocabulary_size=310")
    lines = {cache_line(load_config(str(tiny_config), overrides)) for overrides in [[], *([c] for c in changes)]}
    assert len(lines) == 5
    config = load_config(str(tiny_config), [])
    with Path(config.data.files[0]).open("a", encoding="utf-8") as file:
        file.write('{"prompt": "one", "response": "more"}\n')
    assert len(prepare(config).train) == 33
    assert cache_line(config) not in lines


def test_cache_follows_the_functions_of_the_script(tiny_config):
    def make_pair(record, data):
        return record.text("prompt").upper(), record.text("response")

    def make_example(prompt, response, end_of_text, loss_on):
        return [*prompt, *response, end_of_text], [*prompt, *response, -100]

    config = load_config(str(tiny_config), [])
    ours = (train_gpt.make_pair, train_gpt.make_example)
    tasks = [ours, (make_pair, train_gpt.make_example), (train_gpt.make_pair, make_example)]
    lines = {cache_line(config, lambda config, info, task=task: prepare_data(config, *task, info)) for task in tasks}
    assert len(lines) == 3


def test_cache_follows_the_files_of_a_tokenizer(tiny_config, tmp_path):
    train_tokenizer(["abc"] * 5, 300).save_pretrained(tmp_path / "tokenizer")
    config = load_config(str(tiny_config), [f"tokenizer={{pretrained: {tmp_path / 'tokenizer'}}}"])
    lines = set()
    for content in ("", "b"):
        (tmp_path / "tokenizer" / "merges.txt").write_text(content, encoding="utf-8")
        lines.add(cache_line(config))
    assert len(lines) == 2


def test_seed_decides_split_and_order(tiny_config):
    def rows(seed):
        config = load_config(str(tiny_config), [f"train.seed={seed}"])
        data = prepare(config)
        loader = training_loader(data, config)
        return data.evaluation["location"][:], [batch["locations"] for batch in loader]

    assert rows(1) == rows(1)
    assert sorted(rows(1)[0]) != sorted(rows(2)[0])
    assert rows(1)[1] != rows(2)[1]


def test_tokenizer_has_not_seen_the_held_out_rows(tiny_config, monkeypatch):
    seen = []

    def spy(texts, *settings):
        seen.extend(texts)
        return train_tokenizer(seen, *settings)

    monkeypatch.setattr("utils.data.dataset.train_tokenizer", spy)
    data = prepare(load_config(str(tiny_config), []))
    assert len(seen) == len(data.train) == 32
    assert not any(data.tokenizer.decode(row["input_ids"][:-1]) in seen for row in data.evaluation)


def test_tokenizer_of_large_data_has_seen_every_nth_row(tiny_config, monkeypatch):
    texts = []
    monkeypatch.setattr("utils.data.dataset.train_tokenizer", lambda seen, *_: texts.append(list(seen)) or 1 / 0)
    for size in (2**28, 1):  # more than the data has, and less
        monkeypatch.setattr("utils.data.dataset._TOKENIZER_BYTES", size)
        with pytest.raises(ZeroDivisionError):
            prepare(load_config(str(tiny_config), []))
    whole, least = texts
    assert least == whole[:1]
    stored = sum(map(len, whole))
    monkeypatch.setattr("utils.data.dataset._TOKENIZER_BYTES", stored)  # less than it is with all of a row
    with pytest.raises(ZeroDivisionError):
        prepare(load_config(str(tiny_config), []))
    n = whole.index(texts[2][1])
    assert n > 1
    assert texts[2] == whole[::n]


def test_cache_is_complete_or_absent(tmp_path):
    def write_half(directory):
        (directory / "part").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "cache" / "data", write_half)
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_runs_that_make_the_cache_at_once_leave_one(tmp_path):
    def write_slowly(directory):
        (directory / "content").write_text("first", encoding="utf-8")
        write_atomically(tmp_path / "data", lambda other: (other / "content").write_text("second", encoding="utf-8"))

    write_atomically(tmp_path / "data", write_slowly)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert (tmp_path / "data" / "content").read_text(encoding="utf-8") == "second"


def test_of_several_processes_one_makes_the_cache_and_the_others_wait(tmp_path):
    """A lock of a file excludes threads as it does processes."""
    made, lines = [], []
    all_are_there = threading.Barrier(4)

    def write(directory):
        time.sleep(0.2)
        made.append(directory)
        (directory / "content").write_text("whole", encoding="utf-8")

    def make():
        all_are_there.wait()
        make_once(tmp_path / "data", write, lines.append)
        assert (tmp_path / "data" / "content").read_text(encoding="utf-8") == "whole"

    with ThreadPoolExecutor() as pool:
        for future in [pool.submit(make) for _ in range(4)]:
            future.result()
    assert len(made) == 1
    assert lines == [f"Another process is creating {tmp_path / 'data'}: waiting for it."] * 3


def test_lock_of_a_failed_attempt_is_free(tmp_path):
    def fail(directory):
        raise UserError("no")

    for _ in range(2):
        with pytest.raises(UserError, match="no"):
            make_once(tmp_path / "data", fail, lambda _: None)
    assert not (tmp_path / "data").exists()


def test_cache_directory_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"run\.cache_directory: .*file cannot be used: "):
        make_once(tmp_path / "file" / "data", lambda _: None, lambda _: None)


def test_several_processes_give_the_rows_of_one(tiny_config, monkeypatch):
    """The second run reads from nowhere but its own cache, since its seed is another one."""

    def rows(name, processes):
        monkeypatch.setattr("utils.data.encoding._PER_PROCESS", 40 // processes)
        config = load_config(str(tiny_config), [f"run.cache_directory={Path(tiny_config).parent / name}"])
        lines = []
        data = prepare(config, lines.append)
        assert len(list(Path(config.run.cache_directory).glob("data-*/rows*.arrow"))) == processes
        assert not list(Path(config.run.cache_directory).glob("data-*/examples*"))
        return data.train.to_list(), data.evaluation.to_list(), data.train_counts, lines[2:]

    monkeypatch.setattr("utils.data.encoding.available_cores", lambda: 3)
    assert rows("one", 1) == rows("three", 3)


def test_notes_and_problems_of_all_processes_are_counted(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.data.encoding._PER_PROCESS", 10)
    monkeypatch.setattr("utils.data.encoding.available_cores", lambda: 4)
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"say {i}"},
                {"role": "assistant", "content": f"{i} <|im_end|> it is"},
            ]
        }
        for i in range(40)
    ]
    for i in (17, 31):
        chats[i]["messages"].insert(0, {"role": "assistant", "content": "bad order"})
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    (tmp_path / "strict.jinja").write_text(
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        encoding="utf-8",
    )
    train_tokenizer(["say it is"] * 5, 300, "<|endoftext|>", ("<|im_start|>", "<|im_end|>")).save_pretrained(
        tmp_path / "tokenizer"
    )
    data = prepare(
        load_config(
            str(tiny_config),
            [
                f"data={{files: {tmp_path / 'chats.jsonl'}, chat_template: {tmp_path / 'strict.jinja'}, "
                "format: chat, unusable: skip, eval_rows: 8, max_length: 99}",
                f"tokenizer={{pretrained: {tmp_path / 'tokenizer'}}}",
            ],
        )
    )
    counts = data.train_counts, data.evaluation_counts
    assert sum(split.unusable for split in counts) == 2
    assert any("chats.jsonl:18" in split.first_unusable for split in counts)
    assert len(data.train) + len(data.evaluation) == 38
    assert [note.partition(" (")[0] for note in data.notes] == ["control tokens spelled in 38 of the texts"]
