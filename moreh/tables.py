"""Text layout for terminals: boxed tables and wrapped lines.

`draw_table` draws a table as it is given. `draw_widest` is for tables that can be wider than a terminal: the caller
passes several forms of one table, and the fullest form that fits is drawn.
"""

import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal

Alignment = Literal["left", "right"]
# The width of files and pipes, which have none of their own.
DEFAULT_WIDTH = 100
# A wrapped column does not become narrower than this, even in a terminal that is too narrow for the table.
MIN_WRAPPED_WIDTH = 8


@dataclass(frozen=True)
class Column:
    """The format of a column. Headers are centered."""

    header: str
    width: int
    """The least width in characters, without the margins; a column grows with its content."""
    alignment: Alignment = "left"
    """The alignment of the cells."""
    wraps: bool = False
    """True if cells may be broken into several lines, between words. At most one column of a table does this."""


@dataclass(frozen=True)
class Table:
    """A table, or one of the forms that it takes in terminals of different widths."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    """The cells of each row, one for each column. A cell may have several lines."""
    margin: int = 2
    """Blanks on both sides of a cell."""
    lines: int = 1
    """The most lines that a cell of the wrapping column may take for this form to fit."""

    def without(self, header: str) -> "Table":
        """The table without one column; the same table if it has no such column."""
        selected = [index for index, column in enumerate(self.columns) if column.header != header]
        return replace(
            self,
            columns=tuple(self.columns[index] for index in selected),
            rows=tuple(tuple(row[index] for index in selected) for row in self.rows),
        )

    def shortened(self, header: str, short_header: str, shorten: Callable[[str], str] = str) -> "Table":
        """The table with a shorter header, and perhaps shorter cells, in one of its columns."""
        selected = next(index for index, column in enumerate(self.columns) if column.header == header)
        column = replace(self.columns[selected], header=short_header)
        return replace(
            self,
            columns=(*self.columns[:selected], column, *self.columns[selected + 1 :]),
            rows=tuple((*row[:selected], shorten(row[selected]), *row[selected + 1 :]) for row in self.rows),
        )

    def tightened(self) -> "Table":
        """The table with single blanks around its cells and columns no wider than their content."""
        return replace(self, columns=tuple(replace(column, width=1) for column in self.columns), margin=1)

    def wrapped(self, lines: int) -> "Table":
        """The table with cells of up to `lines` lines in the wrapping column."""
        return replace(self, lines=lines)


def draw_table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str | None = None, margin: int = 2
) -> str:
    """Draw a box with a header and rows, in the platform's format. `title` stands right-aligned in a line on top.

    >>> print(draw_table([Column("Device", 6, "right")], [["0"]]))
    +----------+
    |  Device  |
    +==========+
    |       0  |
    +----------+
    """
    cells = [[column.header for column in columns], *rows]
    widths = [max(column.width, *(_width(row[i]) for row in cells)) for i, column in enumerate(columns)]

    signs = ["<" if column.alignment == "left" else ">" for column in columns]
    header = _row_lines(cells[0], widths, "^" * len(columns), margin)
    inner = len(header[0]) - 2
    border = "+" + "-" * inner + "+"
    lines = [border]
    if title is not None:
        lines += ["|" + (title + " " * margin).rjust(inner) + "|", border]
    lines += [*header, "+" + "=" * inner + "+"]
    for row in rows:
        lines += _row_lines(row, widths, signs, margin)
    return "\n".join([*lines, border])


def draw_widest(forms: Sequence[Table], width: int | None) -> str:
    """Draw the first form that is at most `width` characters wide; None means any width.

    `forms` begin with the fullest one. Where none fits, the last form is drawn with cells of as many lines as it takes.
    """
    fitting = forms[0] if width is None else next((fit for form in forms if (fit := _fit(form, width))), None)
    table = fitting or _squeeze(forms[-1], width or 0)
    return draw_table(table.columns, table.rows, margin=table.margin)


def terminal_width() -> int:
    """Characters in a line of standard output: COLUMNS, else those of the terminal, else DEFAULT_WIDTH."""
    return shutil.get_terminal_size((DEFAULT_WIDTH, 24)).columns


def wrap_line(text: str, width: int | None, indent: int = 0) -> str:
    """Break a line between words so that it fits `width` (None: any); the lines after the first are indented.

    No word is broken, even a path or a plan with a hyphen: a longer one gets its own line.

    >>> print(wrap_line("no word is broken", 10, indent=2))
    no word is
      broken
    """
    if width is None:
        return text
    lines = textwrap.wrap(
        text,
        max(width, 1),
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines)


def _fit(table: Table, width: int) -> Table | None:
    """The table with its wrapping column wrapped as far as needed; None where it does not fit like this."""
    available = width - _width_of_others(table)
    wrapping = _wrapping_column(table)
    if wrapping is None:
        return table if available >= 0 else None
    cells = [row[wrapping] for row in table.rows]
    if max(_width(cell) for cell in [table.columns[wrapping].header, *cells]) <= available:
        return table
    words = [word for cell in [table.columns[wrapping].header, *cells] for word in cell.split()]
    if max(map(len, words), default=0) > available:
        return None
    wrapped = [wrap_line(cell, available) for cell in cells]
    if max((cell.count("\n") + 1 for cell in wrapped), default=1) > table.lines:
        return None
    return _with_wrapped_cells(table, wrapping, wrapped)


def _squeeze(table: Table, width: int) -> Table:
    """The table at the given width, even if it breaks words of its wrapping column."""
    wrapping = _wrapping_column(table)
    if wrapping is None:
        return table
    available = max(width - _width_of_others(table), MIN_WRAPPED_WIDTH)
    wrapped = [
        "\n".join(textwrap.wrap(row[wrapping], available, break_long_words=True, break_on_hyphens=False))
        for row in table.rows
    ]
    return _with_wrapped_cells(table, wrapping, wrapped)


def _with_wrapped_cells(table: Table, wrapping: int, cells: Sequence[str]) -> Table:
    columns = (*table.columns[:wrapping], replace(table.columns[wrapping], width=1), *table.columns[wrapping + 1 :])
    rows = tuple((*row[:wrapping], cell, *row[wrapping + 1 :]) for row, cell in zip(table.rows, cells, strict=True))
    return replace(table, columns=columns, rows=rows)


def _wrapping_column(table: Table) -> int | None:
    return next((index for index, column in enumerate(table.columns) if column.wraps), None)


def _width_of_others(table: Table) -> int:
    """The width of the box without the text of its wrapping column."""
    borders = 1 + sum(2 * table.margin + 1 for _ in table.columns)
    contents = (
        max(column.width, _width(column.header), *(_width(row[index]) for row in table.rows))
        for index, column in enumerate(table.columns)
        if not column.wraps
    )
    return borders + sum(contents)


def _width(cell: str) -> int:
    return max(map(len, cell.split("\n")))


def _row_lines(cells: Sequence[str], widths: Sequence[int], signs: Iterable[str], margin: int) -> list[str]:
    """The lines of a row, each cell aligned by one of Python's format signs <, > and ^."""
    blanks, signs = " " * margin, list(signs)
    return [
        "|"
        + "|".join(
            f"{blanks}{text:{sign}{width}}{blanks}" for text, sign, width in zip(texts, signs, widths, strict=True)
        )
        + "|"
        for texts in zip_longest(*(cell.split("\n") for cell in cells), fillvalue="")
    ]
