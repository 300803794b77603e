"""Reads records from tables of Arrow: Parquet files, directories of `save_to_disk`, and the Hugging Face hub.

A value is converted when a pair needs it: another column may hold what Python has no type for.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.config.source_section import SAVED_SPLITS, is_saved_dataset
from utils.data.records import Record
from utils.errors import UserError, first_line

_ROWS_PER_BATCH = 1000


class _Row(Mapping[str, Any]):
    """A row of a batch. All rows of the batch share the columns that were converted so far."""

    def __init__(self, batch: Any, columns: dict[str, list[Any]], index: int) -> None:
        self._batch, self._columns, self._index = batch, columns, index

    def __getitem__(self, name: str) -> Any:
        if name not in self._batch.schema.names:
            raise KeyError(name)
        if name not in self._columns:
            with contextlib.suppress(ValueError, OverflowError):  # of one value, such as text that is not UTF-8
                self._columns[name] = self._batch.column(name).to_pylist()
        if name not in self._columns:
            return self._batch.column(name)[self._index].as_py()
        return self._columns[name][self._index]

    def __contains__(self, name: object) -> bool:
        return name in self._batch.schema.names

    def __iter__(self) -> Iterator[str]:
        return iter(self._batch.schema.names)

    def __len__(self) -> int:
        return len(self._batch.schema.names)


def read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a Parquet file, each with where it was read.

    Raises:
        UserError: it is damaged, or has a column twice.
    """
    import pyarrow
    import pyarrow.parquet

    index = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise UserError(f"{path}: a column's name is given twice: {', '.join(names)}")
            for batch in file.iter_batches():
                for row in rows_of(batch):
                    yield f"{path}[{index}]", row
                    index += 1
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a valid Parquet file: {first_line(error)}") from None


def rows_of(batch: Any) -> Iterator[Mapping[str, Any]]:
    """The rows of a table or a record batch of Arrow."""
    columns: dict[str, list[Any]] = {}
    for index in range(batch.num_rows):
        yield _Row(batch, columns, index)


def read_saved_dataset(path: Path, split: str) -> Iterator[Record]:
    """The records of a directory that `save_to_disk` has written, of one split where it has several.

    Raises:
        UserError: it cannot be loaded, or has no such split.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises many types for files that are missing or broken
        raise UserError(f"{path}: cannot be loaded: {first_line(error)}") from error
    if (path / SAVED_SPLITS).is_file():
        if split not in loaded:
            raise UserError(f"{path}: has no split {split!r}: give one of {', '.join(loaded)} in data.split")
        loaded = loaded[split]
    yield from _records(loaded, f"{path}[{split}]")


def read_hub(name: str, configuration: str | None, split: str) -> Iterator[Record]:
    """The records of a dataset of the hub, or of a local directory, in one of its configurations where it has several.

    Raises:
        UserError: it cannot be loaded.
    """
    if is_saved_dataset(Path(name)):
        return read_saved_dataset(Path(name), split)
    return _records(load_hub(name, configuration, split), f"{name}[{split}]")


def load_hub(name: str, configuration: str | None, split: str) -> Any:
    """A dataset of the hub, or of a local directory.

    Raises:
        UserError: it cannot be loaded.
    """
    from datasets import load_dataset

    described = f"split {split!r}" if configuration is None else f"configuration {configuration!r}, split {split!r}"
    try:
        return load_dataset(name, configuration, split=split)
    except Exception as error:  # datasets raises many types: no network, no such name, no such split, no access
        raise UserError(
            f"data.hub: {name!r} ({described}) cannot be loaded: {first_line(error)} "
            "Check the name, data.hub_configuration and the network, or give local files in data.files"
        ) from error


def _records(rows: Any, location: str) -> Iterator[Record]:
    """The records of a dataset of `datasets`, or of a list of rows."""
    if hasattr(rows, "with_format"):
        batches = rows.with_format("arrow").iter(_ROWS_PER_BATCH)
        rows = (row for batch in batches for row in rows_of(batch))
    for index, row in enumerate(rows):
        yield Record(f"{location}:{index}", row)
