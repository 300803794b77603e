"""From sources to rows of token ids: files, docstrings, the tokenizer, the border, the cache and the batches."""

import ast
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from utils.config.schema import DataSection
from utils.config.yaml_file import load_config
from utils.data.batches import collate_padded, evaluation_loader, iter_steps, make_labels, training_loader
from utils.data.cache import make_once, write_atomically
from utils.data.data_sources import Pair, read_pairs
from utils.data.dataset import prepare_data
from utils.data.docstring_pairs import read_docstring_pairs
from utils.data.tokenization import encode_pairs, encode_prompts, train_tokenizer
from utils.errors import UserError

ROWS = [{"ask": "añb", "say": 'x, "y"\nz', "extra": "!"}, {"ask": "", "say": "2", "extra": "?"}]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def write_rows(directory, ending):
    path = directory / f"rows.{ending}"
    if ending == "jsonl":
        return write(path, "\n\n".join(json.dumps(row) for row in ROWS))
    if ending == "json":
        return write(path, json.dumps(ROWS, indent=2))
    if ending == "csv":
        return write(path, '\ufeffask,say,extra\nañb,"x, ""y""\nz",!\n,2,?\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_pairs(tmp_path, ending):
    named = {"prompt_field": "ask", "response_field": "say", "template": "<{prompt}|{extra}>"}
    data = DataSection(files=[str(write_rows(tmp_path, ending))], **named)
    assert [(pair.prompt, pair.response) for pair in read_pairs(data)] == [("<añb|!>", 'x, "y"\nz'), ("<|?>", "2")]


def test_docstring_pairs_are_the_source(tmp_path, monkeypatch):
    package = tmp_path / "some_package"
    (package / "tests").mkdir(parents=True)
    source = (
        "class A:\n"
        "    @property\n"
        '    def f(self, x=1):\n        """Say\n        hello."""\n'
        '        # a comment\n        return {\n            "x": x}\n\n'
        "    def no_docstring(self):\n        return 1\n"
        'def only_docstring():\n    """Nothing else."""\n'
        'async def g():\n    """Wait."""\n    return 2\n'
    )
    write(package / "__init__.py", source)
    write(package / "again.py", source)  # the same pairs, given once
    write(package / "broken.py", "def f(:")
    write(
        package / "odd.py",
        'X = 1\n\x0c\ndef h():\n    """Nest."""\n    def k():\n        """In."""\n        return 3\n    return k\n',
    )
    write(package / "tests" / "test_it.py", 'def t():\n    """Left out."""\n    return 1\n')
    monkeypatch.syspath_prepend(tmp_path)
    pairs = sorted((row["prompt"], row["response"]) for _, row in read_docstring_pairs(["some_package"]))
    assert pairs == [
        ('async def g():\n    """Wait."""\n', "    return 2\n"),
        (
            'def f(self, x=1):\n    """Say\n    hello."""\n',
            '    # a comment\n    return {\n        "x": x}\n',
        ),
        # The line of the form feed counts once, and the inner function is not a pair of its own.
        ('def h():\n    """Nest."""\n', '    def k():\n        """In."""\n        return 3\n    return k\n'),
    ]


def test_standard_library_gives_thousands_of_pairs_that_are_python():
    pairs = list(read_docstring_pairs(["stdlib"]))
    assert len(pairs) > 4000
    rng = random.Random(0)
    for place, row in rng.sample(pairs, 300):
        ast.parse(row["prompt"] + row["response"], place)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x + 1\n", "abc abcabc abab"] * 20, 300)


def encode(tokenizer, *pairs, **data):
    return encode_pairs(
        [Pair(str(i), *pair) for i, pair in enumerate(pairs)], tokenizer, DataSection(hub="none", **data)
    )


def test_rows_are_prompt_response_and_end(tokenizer):
    (row,), counts = encode(tokenizer, ("def f(x):\n", "    return x\n"))
    assert tokenizer.decode(row.input_ids[: row.prompt_length]) == "def f(x):\n"
    assert tokenizer.decode(row.input_ids[row.prompt_length : -1]) == "    return x\n"
    assert row.input_ids[-1] == tokenizer.eos_token_id
    assert counts.kept == 1


def test_border_stays_where_tokens_would_merge(tokenizer):
    """`ab` + `c` is one token when written together; generation sees `ab` alone and must meet the ids it was trained on."""
    joined = tokenizer("abc")["input_ids"]
    apart = tokenizer("ab")["input_ids"] + tokenizer("c")["input_ids"]
    assert joined != apart  # so the mistaken way, tokenizing the whole text, gives other ids
    (row,), _ = encode(tokenizer, ("ab", "c"))
    assert row.input_ids[:-1] == apart
    assert row.input_ids[: row.prompt_length] == encode_prompts(["ab"], tokenizer)[0]


def test_tokenizer_that_puts_a_space_before_every_text():
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    alphabet = [*map(chr, range(32, 127)), "\n", "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=["<unk>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator(["def f(x):\n    return x + 1\n"] * 3, trainer)
    llama = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    assert llama.decode(llama("A:")["input_ids"] + llama("two")["input_ids"]) == "A: two"  # what has to be avoided
    rows, _ = encode(llama, ("A:", "two"), ("def f(x):\n", "    return x\n"))
    assert [llama.decode(row.input_ids, skip_special_tokens=True) for row in rows] == [
        "A:two",
        "def f(x):\n    return x\n",
    ]


def test_name_of_the_end_token_in_a_response_is_text(tokenizer):
    (row,), _ = encode(tokenizer, ("p", "say <|endoftext|> twice"))
    assert row.input_ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(row.input_ids[row.prompt_length : -1]) == "say <|endoftext|> twice"


@pytest.mark.parametrize(
    ("data", "kept", "truncated", "too_long", "without_label"),
    [
        ({"max_length": 500}, 3, 0, 0, 0),
        ({"max_length": 12}, 2, 1, 0, 1),  # the third prompt alone fills the row: no label is left
        ({"max_length": 12, "too_long": "drop"}, 1, 0, 2, 0),
        ({"max_length": 12, "loss_on": "all"}, 3, 2, 0, 0),  # then the prompt's tokens are labels
    ],
)
def test_long_rows_and_rows_without_labels_are_counted(tokenizer, data, kept, truncated, too_long, without_label):
    rows, counts = encode(tokenizer, ("a", "b"), ("a", "z" * 40), ("z" * 40, "b"), **data)
    # A row that is cut and then dropped for want of a label counts as dropped only.
    assert (counts.kept, counts.truncated, counts.dropped_too_long, counts.dropped_without_label) == (
        kept,
        truncated,
        too_long,
        without_label,
    )
    assert len(rows) == kept
    assert all(len(row.input_ids) <= data["max_length"] for row in rows)


def test_data_is_tokenized_once(tiny_config, monkeypatch):
    config = load_config(str(tiny_config), [])
    said = []
    first = prepare_data(config, said.append)
    assert any("Reading and tokenizing" in line for line in said)
    monkeypatch.setattr("utils.data.dataset.read_pairs", None)  # would fail if it were called
    again = prepare_data(config, said.append)
    assert first.train.to_list() == again.train.to_list()
    assert first.evaluation.to_list() == again.evaluation.to_list()
    assert first.train_counts == again.train_counts
    held_out = {row["place"] for row in first.evaluation}
    assert len(held_out) == 8
    assert held_out.isdisjoint(row["place"] for row in first.train)


def test_cache_follows_the_settings_and_the_files(tiny_config):
    directories = set()
    for overrides in (
        [],
        ["data.max_length=40"],
        ["data.loss_on=all"],
        ["train.seed=1"],
        ["tokenizer.vocabulary_size=310"],
    ):
        said = []
        prepare_data(load_config(str(tiny_config), overrides), said.append)
        directories.add(said[-1])
    config = load_config(str(tiny_config), [])
    path = config.data.files[0]
    with Path(path).open("a", encoding="utf-8") as file:
        file.write('{"prompt": "one", "response": "more"}\n')
    said = []
    assert len(prepare_data(config, said.append).train) == 33
    assert said[-1] not in directories
    assert len(directories) == 5


def test_cache_is_complete_or_absent(tmp_path):
    def half(directory):
        (directory / "part").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "cache" / "data", half)
    assert list((tmp_path / "cache").iterdir()) == []


def test_rows_are_padded_on_the_right_and_masked_by_their_length(tokenizer):
    """Also where the text begins or ends with the pad token, which ids alone would not tell from padding."""
    rows = [
        {"input_ids": [0, 6, 0], "prompt_length": 1, "place": "a"},
        {"input_ids": [7], "prompt_length": 0, "place": "b"},
    ]
    tokenizer.padding_side = "left"
    try:
        batch = collate_padded(rows, tokenizer, 4)
    finally:
        tokenizer.padding_side = "right"
    assert batch["input_ids"].tolist() == [[0, 6, 0, 0], [7, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert make_labels(batch, "response").tolist() == [[-100, 6, 0, -100], [7, -100, -100, -100]]
    assert make_labels(batch, "all").tolist() == [[0, 6, 0, -100], [7, -100, -100, -100]]


def test_empty_prompt_is_the_token_that_begins_a_text(tokenizer):
    (row,), _ = encode(tokenizer, ("", "abc"))
    assert row.input_ids[0] == tokenizer.bos_token_id
    assert row.prompt_length == 1
    assert tokenizer.decode(row.input_ids[1:-1]) == "abc"


def test_end_of_text_that_a_tokenizer_adds_is_not_in_the_prompt():
    from tokenizers import processors

    adding = train_tokenizer(["abc"] * 5, 300)
    end = processors.TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    adding._tokenizer.post_processor = end
    assert adding("abc")["input_ids"][-1] == 0
    assert 0 not in encode_prompts(["abc"], adding)[0]


def test_equal_pairs_are_kept_once(tmp_path):
    path = write(tmp_path / "d.jsonl", '{"prompt": "p", "response": "r"}\n' * 3 + '{"prompt": "p", "response": "s"}\n')
    assert [pair.response for pair in read_pairs(DataSection(files=[str(path), str(path)]))] == ["r", "s"]


def test_seed_decides_split_and_order(tiny_config):
    def rows(seed):
        config = load_config(str(tiny_config), [f"train.seed={seed}"])
        data = prepare_data(config, lambda _: None)
        loader = training_loader(data.train, data.tokenizer, config)
        return data.evaluation["place"][:], [batch["places"] for batch in loader]

    assert rows(1) == rows(1)
    assert sorted(rows(1)[0]) != sorted(rows(2)[0])
    assert rows(1)[1] != rows(2)[1]


def test_tokenizer_has_not_seen_the_held_out_rows(tiny_config, monkeypatch):
    seen = []
    original = train_tokenizer

    def spy(texts, size):
        seen.extend(texts)
        return original(seen, size)

    monkeypatch.setattr("utils.data.dataset.train_tokenizer", spy)
    data = prepare_data(load_config(str(tiny_config), []), lambda _: None)
    assert len(seen) == len(data.train) == 32
    assert not any(data.tokenizer.decode(row["input_ids"][:-1]) in seen for row in data.evaluation)


def test_cache_follows_the_files_of_a_tokenizer(tiny_config, tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = load_config(str(tiny_config), [f"tokenizer.pretrained={tmp_path / 'tokenizer'}"])
    directories = []
    for content in ("a", "b"):
        (tmp_path / "tokenizer" / "merges.txt").write_text(content * len(directories), encoding="utf-8")
        said = []
        prepare_data(config, said.append)
        directories.append(said[-1])
    assert directories[0] != directories[1]


def test_two_runs_that_make_the_cache_at_once(tmp_path):
    def write_slowly(directory):
        (directory / "content").write_text("first", encoding="utf-8")
        write_atomically(tmp_path / "data", lambda other: (other / "content").write_text("second", encoding="utf-8"))

    write_atomically(tmp_path / "data", write_slowly)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert (tmp_path / "data" / "content").read_text(encoding="utf-8") == "second"


def test_batches_come_in_a_fixed_order_whatever_their_size(tiny_config):
    orders = []
    for batch_size, accumulation in ((8, 1), (4, 2), (2, 4)):
        config = load_config(str(tiny_config), [f"train.batch_size={batch_size}"])
        data = prepare_data(config, lambda _: None)
        loader = training_loader(data.train, data.tokenizer, config)
        steps = list(iter_steps(loader, accumulation, 6))  # 32 rows, so the fifth step begins a new epoch
        orders.append([[place for batch in step for place in batch["places"]] for step in steps])
    assert orders[0] == orders[1] == orders[2]
    assert sorted(place for step in orders[0][:4] for place in step) == sorted(data.train["place"])
    assert orders[0][4] != orders[0][0]


def test_evaluation_sees_every_row(tiny_config):
    config = load_config(str(tiny_config), ["log.eval_batch_size=3"])
    data = prepare_data(config, lambda _: None)
    batches = list(evaluation_loader(data.evaluation, data.tokenizer, config))
    assert [len(batch["places"]) for batch in batches] == [3, 3, 2]
    assert batches[0]["input_ids"].shape == torch.Size([3, 48])


def test_hub_that_cannot_be_reached_gives_one_line():
    with pytest.raises(UserError, match=r"data\.hub: 'no/such' \(split 'train'\) cannot be loaded: .*data\.files"):
        read_pairs(DataSection(hub="no/such"))


def test_hub_data_set_is_read_in_its_configuration(monkeypatch):
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return [{"prompt": "p", "response": "r"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert [pair.response for pair in read_pairs(DataSection(hub="a/b", hub_configuration="3.0.0"))] == ["r"]
    read_pairs(DataSection(hub="a/b", split="test"))
    assert asked == [("a/b", "3.0.0", "train"), ("a/b", None, "test")]


def test_configuration_without_a_hub_is_refused(tiny_config):
    with pytest.raises(
        UserError, match=r"data: hub_configuration is '3\.0\.0' but there is no hub: give hub, or leave it out"
    ):
        load_config(str(tiny_config), ["data.hub_configuration=3.0.0"])
    with pytest.raises(
        UserError, match=r"data\.hub: 'no/such' \(configuration '3\.0\.0', split 'train'\) cannot be loaded"
    ):
        read_pairs(DataSection(hub="no/such", hub_configuration="3.0.0"))


def test_of_several_processes_one_makes_the_cache_and_the_others_wait(tmp_path):
    """A lock of a file excludes threads as it does processes."""
    made, said = [], []
    all_are_there = threading.Barrier(4)

    def write(directory):
        time.sleep(0.2)
        made.append(directory)
        (directory / "content").write_text("whole", encoding="utf-8")

    def want():
        all_are_there.wait()
        make_once(tmp_path / "data", write, said.append)
        assert (tmp_path / "data" / "content").read_text(encoding="utf-8") == "whole"

    with ThreadPoolExecutor() as pool:
        for future in [pool.submit(want) for _ in range(4)]:
            future.result()
    assert len(made) == 1
    assert said == [f"Another process is making {tmp_path / 'data'}: waiting for it."] * 3


def test_lock_of_a_failed_attempt_is_free(tmp_path):
    def fail(directory):
        raise UserError("no")

    for _ in range(2):
        with pytest.raises(UserError, match="no"):
            make_once(tmp_path / "data", fail, lambda _: None)
    assert not (tmp_path / "data").exists()


def test_cache_that_cannot_be_used(tmp_path):
    write(tmp_path / "file", "")
    with pytest.raises(UserError, match=r"run\.cache_directory: .*file cannot be used: "):
        make_once(tmp_path / "file" / "data", lambda _: None, lambda _: None)
