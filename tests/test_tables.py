"""Tables and lines that fit a terminal."""

import pytest

from moreh.tables import DEFAULT_WIDTH, Column, Table, draw_table, draw_widest, terminal_width, wrap_line

FULL = Table((Column("#", 4, "right"), Column("Plan", 4, wraps=True), Column("Speed", 4)), (("1", "a1 b2 c3", "10/s"),))
FORMS = [FULL, FULL.tightened(), FULL.tightened().wrapped(2), FULL.tightened().without("Speed").wrapped(2)]


def test_columns_grow_with_their_content():
    table = draw_table([Column("A", 3), Column("B", 1, "right")], [["long text", "1"], ["x", "22"]])
    assert table.splitlines()[3:5] == ["|  long text  |   1  |", "|  x          |  22  |"]


def test_cell_of_several_lines_makes_its_row_higher():
    table = draw_table([Column("A", 1), Column("B", 1, "right")], [["x\nyy", "1"], ["z", "2"]], margin=1)
    assert table.splitlines()[3:6] == ["| x  | 1 |", "| yy |   |", "| z  | 2 |"]


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (None, ["|     1  |  a1 b2 c3  |  10/s   |"]),
        (33, ["|     1  |  a1 b2 c3  |  10/s   |"]),
        (32, ["| 1 | a1 b2 c3 | 10/s  |"]),
        (24, ["| 1 | a1 b2 c3 | 10/s  |"]),
        (23, ["| 1 | a1 b2 | 10/s  |", "|   | c3    |       |"]),
        (19, ["| 1 | a1 b2 c3 |"]),
        (15, ["| 1 | a1 b2 |", "|   | c3    |"]),
    ],
)
def test_fullest_form_that_fits_is_drawn(width, expected):
    lines = draw_widest(FORMS, width).splitlines()
    assert lines[3:-1] == expected
    assert width is None or len(lines[0]) <= width


def test_last_form_is_squeezed_where_none_fits():
    table = Table((Column("Plan", 1, wraps=True),), (("unbreakable-word short",),), margin=1)
    assert draw_widest([table], 14).splitlines()[3:-1] == ["| unbreakabl |", "| e-word     |", "| short      |"]


def test_shortened_column_has_another_header_and_other_cells():
    short = FULL.shortened("Speed", "v", lambda cell: cell.removesuffix("/s"))
    assert (short.columns[2].header, short.rows[0][2]) == ("v", "10")
    assert FULL.without("no such column") == FULL


def test_line_is_wrapped_between_words_with_an_indent():
    assert wrap_line("Note  one two three", 14, indent=6) == "Note  one two\n      three"
    assert wrap_line("Note  one two three", None, indent=6) == "Note  one two three"


@pytest.mark.parametrize("word", ["/a/path/that/is/longer/than/the/line", "recompute:zero-bubble:2"])
def test_word_longer_than_the_line_is_not_broken(word):
    assert wrap_line(f"in {word} now", 12) == f"in\n{word}\nnow"


def test_width_is_that_of_columns_or_of_a_file(monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "73")
    assert terminal_width() == 73
    monkeypatch.delenv("COLUMNS")
    assert terminal_width() == DEFAULT_WIDTH == 100
