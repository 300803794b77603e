"""From a source to pairs: file formats, the hub, and the docstrings of Python sources."""

import ast
import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from tests.helpers.scripts.tiny_runs import texts_of
from utils.config.schema import DataSection
from utils.config.yaml_file import load_config
from utils.data.sources.docstring_pairs import read_docstring_pairs
from utils.errors import UserError

ROWS = [{"ask": "añb", "say": 'x, "y"\nz', "extra": "!"}, {"ask": "", "say": "2", "extra": "?"}]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def write_rows(directory, extension):
    path = directory / f"rows.{extension}"
    if extension == "jsonl":
        return write(path, "\n\n".join(json.dumps(row) for row in ROWS))
    if extension == "json":
        return write(path, json.dumps(ROWS, indent=2))
    if extension == "csv":
        return write(path, '\ufeffask,say,extra\nañb,"x, ""y""\nz",!\n,2,?\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("extension", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_pairs(tmp_path, extension):
    fields = {"prompt_field": "ask", "response_field": "say", "template": "<{prompt}|{extra}>"}
    data = DataSection(files=[str(write_rows(tmp_path, extension))], **fields)
    assert texts_of(data) == [("<añb|!>", 'x, "y"\nz'), ("<|?>", "2")]


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
    write(package / "again.py", source)  # the same pairs, read once
    write(package / "broken.py", "def f(:")
    write(
        package / "odd.py",
        'X = 1\n\x0c\ndef h():\n    """Nest."""\n    def k():\n        """In."""\n        return 3\n    return k\n',
    )
    write(package / "tests" / "test_it.py", 'def t():\n    """Left out."""\n    return 1\n')
    monkeypatch.syspath_prepend(tmp_path)
    records = read_docstring_pairs(["some_package"])
    assert sorted((record.fields["prompt"], record.fields["response"]) for record in records) == [
        ('async def g():\n    """Wait."""\n', "    return 2\n"),
        (
            'def f(self, x=1):\n    """Say\n    hello."""\n',
            '    # a comment\n    return {\n        "x": x}\n',
        ),
        # The line of the form feed counts once, and the inner function is not a pair of its own.
        ('def h():\n    """Nest."""\n', '    def k():\n        """In."""\n        return 3\n    return k\n'),
    ]


def test_standard_library_gives_thousands_of_pairs_that_are_python():
    records = list(read_docstring_pairs(["stdlib"]))
    assert len(records) > 4000
    rng = random.Random(0)
    for record in rng.sample(records, 300):
        ast.parse(record.fields["prompt"] + record.fields["response"], record.location)


def test_hub_that_cannot_be_reached_gives_one_line():
    with pytest.raises(UserError, match=r"data\.hub: 'no/such' \(split 'train'\) cannot be loaded: .*data\.files"):
        texts_of(DataSection(hub="no/such"))


def test_hub_dataset_is_read_in_its_configuration(monkeypatch):
    loaded = []

    def load_dataset(*names, split):
        loaded.append((*names, split))
        return [{"prompt": "p", "response": "r"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert texts_of(DataSection(hub="a/b", hub_configuration="3.0.0")) == [("p", "r")]
    assert texts_of(DataSection(hub="a/b", split="test")) == [("p", "r")]
    assert loaded == [("a/b", "3.0.0", "train"), ("a/b", None, "test")]


def test_configuration_without_a_hub_is_refused(tiny_config):
    with pytest.raises(
        UserError, match=r"data: hub_configuration is '3\.0\.0', but there is no hub: give hub, or leave it out"
    ):
        load_config(str(tiny_config), ["data.hub_configuration=3.0.0"])
    with pytest.raises(
        UserError, match=r"data\.hub: 'no/such' \(configuration '3\.0\.0', split 'train'\) cannot be loaded"
    ):
        texts_of(DataSection(hub="no/such", hub_configuration="3.0.0"))
