"""A prompt of a file or of standard input is read as the files of data are."""

import argparse
import io
from types import SimpleNamespace

import pytest

from utils.text.prompt_input import read_prompt


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_byte_order_mark_and_line_ends_are_no_part_of_a_prompt(tmp_path, monkeypatch, source):
    content = "\ufefff(x)\r\ny".encode()
    path = tmp_path / "prompt.txt"
    path.write_bytes(content)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content), isatty=lambda: False))
    file = str(path) if source == "file" else None
    assert read_prompt(argparse.Namespace(prompt=None, file=file)) == "f(x)\ny"
