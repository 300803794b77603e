"""Reads records from files of JSON, CSV, plain text and Parquet.

The project has its own readers because their errors name the file and the line; those of `datasets` do not.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from utils.data.records import Record, SpelledNumber
from utils.data.sources.table_readers import read_parquet
from utils.errors import UserError

MAX_FIELD_CHARACTERS = 2**31 - 1
# The one field of a line of plain text, as in `datasets`.
TEXT_FIELD = "text"

# What a reader yields: where a row was read, and its content.
_Rows = Iterator[tuple[str, Any]]


def read_file(path: Path) -> Iterator[Record]:
    """The records of a file, in the format that its extension names.

    Raises:
        UserError: the extension is unknown, a line or the file is broken, a row has no named fields, or there are no
            rows.
    """
    is_packed = path.suffix.lower() in _OPENERS
    extension = path.with_suffix("").suffix if is_packed else path.suffix
    reader = _READERS.get(extension.lower())
    if reader is None or (is_packed and reader is read_parquet):
        raise UserError(
            f"{path}: unknown extension {extension or path.suffix!r}: give a file that ends in {', '.join(_READERS)}, "
            f"all but .parquet also with {', '.join(_OPENERS)}"
        )
    empty = True
    try:
        for location, row in reader(path):
            if not isinstance(row, Mapping):
                raise UserError(f"{location}: expected an object with named fields, found {type(row).__name__}")
            empty = False
            yield Record(location, row)
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise UserError(f"{path}: not UTF-8 text: {byte}; convert it, for example with iconv -t utf-8") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if empty:
        raise UserError(f"{path}: has no rows")


def _open(path: Path, newline: str | None = None) -> TextIO:
    opener = _OPENERS.get(path.suffix.lower())
    file = path.open("rb") if opener is None else opener(path)
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)


def _open_zstd(path: Path) -> Any:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


# By the extension of a compressed file, a function that opens it for reading bytes.
_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def _read_jsonl(path: Path) -> _Rows:
    with _open(path) as file:
        yield from _rows_of_lines(path, file)


def _rows_of_lines(path: Path, lines: Iterable[str]) -> _Rows:
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        location = f"{path}:{line_number}"
        try:
            yield location, _load_json(line.rstrip("\n"))  # an error at the end of the line has its column there
        except json.JSONDecodeError as error:
            raise UserError(f"{location}: not valid JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, or as many brackets
            raise UserError(f"{location}: cannot be read: {error}") from None


def _read_json(path: Path) -> _Rows:
    """The rows of a list of objects; JSON Lines under this name are read as such, as `datasets` does."""
    with _open(path) as file:
        text = file.read()
    try:
        content = _load_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{") and "\n" in text[: error.pos]:
            yield from _rows_of_lines(path, text.split("\n"))
            return
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list of objects, found {type(content).__name__}")
    for index, row in enumerate(content):
        yield f"{path}[{index}]", row


def _load_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object, parse_float=SpelledNumber)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are all different; Python would take the last of two values without a word."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} is given twice in an object")
    return content


def _read_text(path: Path) -> _Rows:
    with _open(path) as file:
        for line_number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{line_number}", {TEXT_FIELD: line.rstrip("\n")}


def _read_csv(path: Path, delimiter: str = ",") -> _Rows:
    with _open(path, newline="") as file:
        csv.field_size_limit(MAX_FIELD_CHARACTERS)  # by default 131,072, less than a long document
        reader = csv.reader(file, strict=True, delimiter=delimiter)
        try:
            header = next(reader, None)
            if header is None:
                return
            if len(set(header)) < len(header):
                raise UserError(f"{path}:1: a column's name is given twice: {', '.join(header)}")
            first_line = reader.line_num + 1  # of the row, whose fields may have several lines
            for row in reader:
                location = f"{path}:{first_line}"
                first_line = reader.line_num + 1
                if row and len(row) != len(header):
                    raise UserError(f"{location}: {len(row)} columns, but the header has {len(header)}")
                if row:
                    yield location, dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None


_READERS: dict[str, Callable[[Path], _Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": read_parquet,
    ".ndjson": _read_jsonl,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".txt": _read_text,
}
