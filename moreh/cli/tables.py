"""The boxes that the tools draw, in the platform's format."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Alignment = Literal["left", "right"]
_MARGIN = "  "


@dataclass(frozen=True)
class Column:
    """A column's header, its least width without margins, and where its cells stand. Headers are centred."""

    header: str
    width: int
    alignment: Alignment = "left"


def draw_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str | None = None) -> str:
    """A box with a header and rows; columns grow with their content. `title` stands right-aligned in a line on top.

    >>> print(draw_table([Column("Device", 6, "right")], [["0"]]))
    +----------+
    |  Device  |
    +==========+
    |       0  |
    +----------+
    """
    cells = [[column.header for column in columns], *rows]
    widths = [max(column.width, *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]

    signs = ["<" if column.alignment == "left" else ">" for column in columns]
    header = _line(cells[0], widths, "^" * len(columns))
    inner = len(header) - 2
    border = "+" + "-" * inner + "+"
    lines = [border]
    if title is not None:
        lines += ["|" + (title + _MARGIN).rjust(inner) + "|", border]
    lines += [header, "+" + "=" * inner + "+"]
    lines += [_line(row, widths, signs) for row in rows]
    return "\n".join([*lines, border])


def _line(texts: Sequence[str], widths: Sequence[int], signs: Sequence[str]) -> str:
    """A line of cells, each aligned by one of Python's format signs <, > and ^."""
    parts = [f"{text:{sign}{width}}" for text, width, sign in zip(texts, widths, signs, strict=True)]
    return "|" + "|".join(_MARGIN + part + _MARGIN for part in parts) + "|"
