"""The lines of a training script on the console."""

import logging

import pytest

from utils.logging.console import _ConsoleHandler

WORDS = "words " * 30


@pytest.mark.parametrize("text", [WORDS, f"Sample:\ndef f():\n    {WORDS}\n    return 1"], ids=["line", "sample"])
def test_no_line_is_wider_than_the_console(text, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    record = logging.LogRecord("train", logging.INFO, __file__, 1, text, None, None)
    record.is_sample = text != WORDS
    _ConsoleHandler().emit(record)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 60
    assert shown.split() == text.split()
    assert "Sample" not in text or shown.endswith("\n    return 1\n")  # a short line keeps its indentation


def test_table_keeps_its_rows(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    table = f"Differences:\n  setting  {WORDS}"
    _ConsoleHandler().emit(logging.LogRecord("train", logging.INFO, __file__, 1, table, None, None))
    assert capsys.readouterr().out == f"{table}\n"
