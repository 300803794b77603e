"""Files as users have them: formats, packed files, saved datasets, names given twice, columns that nobody named."""

import bz2
import datetime
import gzip
import itertools
import json
import lzma
import struct
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.helpers.scripts.tiny_runs import texts_of
from utils.config.schema import DataSection
from utils.errors import UserError

ROWS = [{"prompt": "añb", "response": "x"}, {"prompt": "p", "response": "y"}]
PAIRS = [("añb", "x"), ("p", "y")]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def compress_zstd(content):
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": compress_zstd}


def pairs_of(path, **settings):
    return texts_of(DataSection(files=[str(path)], **settings))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.ndjson", LINES),
        ("d.json", LINES),
        ("d.JSONL", LINES),
        ("d.tsv", "prompt\tresponse\nañb\tx\np\ty\n"),
        ("d.jsonl.gz", LINES),
        ("d.json.gz", json.dumps(ROWS)),
        ("d.jsonl.bz2", LINES),
        ("d.jsonl.xz", LINES),
        ("d.jsonl.zst", LINES),
        ("d.csv.gz", "prompt,response\r\nañb,x\r\np,y\r\n"),
        ("d.tsv.gz", "prompt\tresponse\nañb\tx\np\ty\n"),
    ],
)
def test_formats_of_daily_use_give_the_same_pairs(tmp_path, name, text):
    content = text.encode()
    (tmp_path / name).write_bytes(COMPRESS.get(Path(name).suffix, bytes)(content))
    assert pairs_of(tmp_path / name) == PAIRS


def test_lines_of_a_text_are_responses_without_prompts(tmp_path):
    (tmp_path / "d.txt").write_bytes("\ufeffone line\r\n\r\n  another \n".encode())
    assert pairs_of(tmp_path / "d.txt", prompt_field=None, response_field="text") == [
        ("", "one line"),
        ("", "  another "),
    ]


def test_column_of_texts_needs_no_prompts(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "d.parquet")
    assert pairs_of(tmp_path / "d.parquet", prompt_field=None, response_field="text") == [("", "a"), ("", "b")]


@pytest.mark.parametrize("extension", COMPRESS)
@pytest.mark.parametrize("damage", [lambda _: b"not packed", lambda packed: packed[:-9]], ids=["not packed", "cut off"])
def test_damaged_packed_file_is_named(tmp_path, extension, damage):
    path = tmp_path / f"d.jsonl{extension}"
    path.write_bytes(damage(COMPRESS[extension](LINES.encode())))
    with pytest.raises(UserError, match=rf"d\.jsonl\{extension}: cannot be read: "):
        pairs_of(path)


def test_packed_parquet_is_refused(tmp_path):
    (tmp_path / "d.parquet.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"unknown extension '.parquet': .*all but \.parquet also with \.gz"):
        pairs_of(tmp_path / "d.parquet.gz")


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        (
            "d.jsonl",
            LINES + '{"prompt": "p"\n' + LINES,
            r"d\.jsonl:3: not valid JSON: Expecting ',' delimiter at column 15$",
        ),
        ("d.jsonl", "\xe9", r"d\.jsonl: not UTF-8 text: byte 0 is 0xe9; convert it, for example with iconv"),
        ("d.csv", 'prompt,response\n"a\nb",c\n\n"a\nb\nc"\n', r"d\.csv:5: 1 columns, but the header has 2"),
    ],
)
def test_broken_row_has_the_place_where_it_begins(tmp_path, name, text, problem):
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=problem):
        pairs_of(tmp_path / name)


@pytest.mark.parametrize("extension", ["jsonl", "json", "parquet"])
def test_name_given_twice_is_refused(tmp_path, extension):
    path = tmp_path / f"d.{extension}"
    if extension == "parquet":
        table = pyarrow.Table.from_arrays([["p"], ["a"], ["b"]], names=["prompt", "response", "response"])
        pyarrow.parquet.write_table(table, path)
        message = r"d\.parquet: a column's name is given twice: prompt, response, response"
    else:
        row = '{"prompt": "p", "response": "a", "response": "b"}'
        path.write_text(f"[{row}]" if extension == "json" else row, encoding="utf-8")
        message = r"d\.json.* cannot be read: the name 'response' is given twice in an object"
    with pytest.raises(UserError, match=message):
        pairs_of(path)


def strange_table():
    days = pyarrow.array([2**22, 2**22], pyarrow.int32()).cast(pyarrow.date32())  # in the year 13453
    with pytest.raises((OverflowError, ValueError)):
        days.to_pylist()
    return pyarrow.table({"prompt": ["añb", "p"], "response": ["x", "y"], "day": days})


def test_columns_that_nobody_named_are_not_read(tmp_path):
    pyarrow.parquet.write_table(strange_table(), tmp_path / "d.parquet")
    assert pairs_of(tmp_path / "d.parquet") == PAIRS
    datasets.Dataset(strange_table()).save_to_disk(str(tmp_path / "saved"))
    assert pairs_of(tmp_path / "saved") == PAIRS


def test_saved_datasets_are_read_from_files_and_hub(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    rows.select([1, 0]).select([1, 0]).save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(str(tmp_path / "splits"))
    assert pairs_of(tmp_path / "saved") == texts_of(DataSection(hub=str(tmp_path / "saved"))) == PAIRS
    assert pairs_of(tmp_path / "splits") == texts_of(DataSection(hub=str(tmp_path / "splits"))) == PAIRS
    assert pairs_of(tmp_path / "splits", split="test") == PAIRS[1:]
    with pytest.raises(UserError, match=r"splits: has no split 'other': give one of train, test in data\.split"):
        pairs_of(tmp_path / "splits", split="other")


def test_directory_of_files_is_loaded_by_datasets(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.jsonl").write_text(LINES, encoding="utf-8")
    assert texts_of(DataSection(hub=str(tmp_path / "mine"))) == PAIRS


def test_fields_with_dots_and_blanks_are_fields(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"the prompt": "p", "a.b": "q", "the.answer": "r"}', encoding="utf-8")
    fields = {"prompt_field": "the prompt", "response_field": "the.answer", "template": "{prompt} {a.b} {the prompt}"}
    assert pairs_of(tmp_path / "d.jsonl", **fields) == [("p q p", "r")]


def test_null_beside_the_prompt_is_empty(tmp_path):
    row = {"prompt": "p", "input": None, "response": "r"}
    (tmp_path / "d.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert pairs_of(tmp_path / "d.jsonl", template="{prompt}\n{input}") == [("p\n", "r")]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([row, row | {"input": "i", "prompt": "q"}]), tmp_path / "d.parquet"
    )
    assert pairs_of(tmp_path / "d.parquet", template="{prompt}\n{input}") == [("p\n", "r"), ("q\ni", "r")]


def test_numbers_are_the_digits_of_the_file_where_the_settings_say_so(tmp_path):
    numbers = ["7", "2.50", "1e3", "-0", "12345678901234567890.10"]
    lines = "".join(f'{{"prompt": "p{i}", "response": {number}}}\n' for i, number in enumerate(numbers))
    (tmp_path / "d.jsonl").write_text(lines, encoding="utf-8")
    with pytest.raises(UserError, match=r"d\.jsonl:1: field 'response' is 7, not a string: data\.numbers=text reads"):
        pairs_of(tmp_path / "d.jsonl")
    assert [response for _, response in pairs_of(tmp_path / "d.jsonl", numbers="text")] == [
        "7",
        "2.50",
        "1e3",
        "0",
        numbers[4],
    ]
    for value in ("true", "NaN", '["a"]', str(datetime.date(2024, 1, 1).year) + "e999"):
        (tmp_path / "d.jsonl").write_text(f'{{"prompt": "p", "response": {value}}}', encoding="utf-8")
        with pytest.raises(UserError, match="not a string"):
            pairs_of(tmp_path / "d.jsonl", numbers="text")


def text_column(*contents):
    """A column of text in which nothing checks that the bytes are UTF-8, as in a damaged file."""
    offsets = [0, *itertools.accumulate(map(len, contents))]
    buffers = [pyarrow.py_buffer(struct.pack(f"{len(offsets)}i", *offsets)), pyarrow.py_buffer(b"".join(contents))]
    return pyarrow.StringArray.from_buffers(len(contents), *buffers)


def test_text_of_a_table_that_is_not_utf_8_is_an_unusable_row(tmp_path):
    path = tmp_path / "d.parquet"
    columns = {"prompt": text_column(b"p", b"\xf2 4", b"r"), "response": ["x", "y", "z"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(UserError, match=r"d\.parquet\[1\]: field 'prompt' cannot be read: 'utf-8' codec can't decode"):
        pairs_of(path)
    assert pairs_of(path, unusable="skip") == [("p", "x"), ("r", "z")]
