"""Reads records from JSONL, JSON, CSV and Parquet files, or from the Hugging Face hub.

The project has its own readers because their errors name the file and the line; those of `datasets` do not.
"""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from utils.data.records import Record
from utils.errors import UserError, first_line

MAX_FIELD_CHARACTERS = 2**31 - 1

# What a reader yields: where a row was read, and its content.
_Rows = Iterator[tuple[str, Any]]


def read_file(path: Path) -> Iterator[Record]:
    """The records of a file, in the format that its extension names.

    Raises:
        UserError: the extension is unknown, a line or the file is broken, a row has no named fields, or there are no
            rows.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: unknown extension {path.suffix!r}: give a file that ends in {', '.join(_READERS)}")
    empty = True
    try:
        for location, row in reader(path):
            if not isinstance(row, dict):
                raise UserError(f"{location}: expected an object with named fields, found {type(row).__name__}")
            empty = False
            yield Record(location, row)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if empty:
        raise UserError(f"{path}: has no rows")


def read_hub(name: str, configuration: str | None, split: str) -> Iterator[Record]:
    """The records of a dataset of the hub, in one of its configurations where it has several.

    Raises:
        UserError: the dataset cannot be loaded.
    """
    from datasets import load_dataset

    described = f"split {split!r}" if configuration is None else f"configuration {configuration!r}, split {split!r}"
    try:
        rows = load_dataset(name, configuration, split=split)
    except Exception as error:  # datasets raises many types: no network, no such name, no such split, no access
        raise UserError(
            f"data.hub: {name!r} ({described}) cannot be loaded: {first_line(error)} "
            "Check the name, data.hub_configuration and the network, or give local files in data.files"
        ) from error
    for index, row in enumerate(rows):
        yield Record(f"{name}[{split}]:{index}", row)


def _read_jsonl(path: Path) -> _Rows:
    with path.open(encoding="utf-8-sig") as file:
        for line_number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            location = f"{path}:{line_number}"
            try:
                yield location, json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{location}: not valid JSON: {error.msg} at column {error.colno}") from None
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, or as many brackets
                raise UserError(f"{location}: cannot be read: {error}") from None


def _read_json(path: Path) -> _Rows:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError:
        raise  # a ValueError, which `read_file` reports
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list of objects, found {type(content).__name__}")
    for index, row in enumerate(content):
        yield f"{path}[{index}]", row


def _read_csv(path: Path) -> _Rows:
    with path.open(encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(MAX_FIELD_CHARACTERS)  # by default 131,072, less than a long document
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            if len(set(header)) < len(header):
                raise UserError(f"{path}:1: a column's name is given twice: {', '.join(header)}")
            for row in reader:
                location = f"{path}:{reader.line_num}"
                if row and len(row) != len(header):
                    raise UserError(f"{location}: {len(row)} columns, but the header has {len(header)}")
                if row:
                    yield location, dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None


def _read_parquet(path: Path) -> _Rows:
    import pyarrow
    import pyarrow.parquet

    index = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                yield f"{path}[{index}]", row
                index += 1
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a valid Parquet file: {str(error).splitlines()[0]}") from None


_READERS: dict[str, Callable[[Path], _Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
