"""Reads the pairs or conversations of a run from its data source, and counts them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Generic, TypeVar

from tqdm import tqdm

from utils.config.data_section import DataSection
from utils.data.conversations import Conversation, conversation_of_pair, read_conversation
from utils.data.records import MakePair, Pair, Record, UnusableRow
from utils.data.sources.docstring_pairs import read_docstring_pairs
from utils.data.sources.file_readers import read_file
from utils.data.sources.summary_pairs import read_summary_pairs
from utils.data.sources.table_readers import read_hub, read_saved_dataset
from utils.errors import UserError

ExampleT = TypeVar("ExampleT", Pair, Conversation)
_HINT = " (data.unusable=skip leaves such rows out)"


@dataclass(frozen=True)
class SourceCounts:
    """The counts of a source's rows, by outcome."""

    read: int = 0
    """Rows of the source."""
    duplicates: int = 0
    """Rows that were dropped because an earlier one gave an equal pair."""
    empty: int = 0
    """Rows that were dropped because their response is empty."""
    unusable: int = 0
    """Rows that were skipped because they lack a text."""
    first_unusable: str = ""
    """The reason why the first of these was skipped."""

    @property
    def used(self) -> int:
        """Rows that gave an example. Duplicates among them are counted only when all are read."""
        return self.read - self.empty - self.unusable

    def __str__(self) -> str:
        left_out = [
            (self.duplicates, "equal to an earlier one (data.duplicates)"),
            (self.empty, "with an empty response (data.empty_responses)"),
            (self.unusable, f"unusable (data.unusable), the first: {self.first_unusable}"),
        ]
        texts = [f"{count} {what}" for count, what in left_out if count]
        return f"{self.read} read" + (f"; left out: {'; '.join(texts)}" if texts else "")


class ExampleReader(Generic[ExampleT]):
    """Iterates over the examples that `make` makes of a source's records, in their order, and counts the others.

    Raises:
        UserError: the source cannot be read, or a record is not usable and `data.unusable` is `refuse`.
    """

    def __init__(self, data: DataSection, records: Iterable[Record], make: Callable[[Record], ExampleT]) -> None:
        self._data, self._records = data, records
        self._make: Callable[[Record], ExampleT] = make
        self.counts = SourceCounts()
        """The counts of the records read so far, by outcome. Duplicates are not known yet."""

    def __iter__(self) -> Iterator[ExampleT]:
        data = self._data
        for record in tqdm(self._records, desc="reading", unit=" rows", disable=None):
            counts = self.counts = replace(self.counts, read=self.counts.read + 1)
            try:
                example = self._make(replace(record, numbers=data.numbers))
                if example.has_empty_answer and data.empty_responses == "refuse":
                    raise UserError(
                        f"{record.location}: the response is empty (data.empty_responses=drop leaves it out)"
                    )
            except UnusableRow as error:
                if data.unusable == "refuse":
                    raise UserError(f"{error}{_HINT}") from None
                self.counts = replace(
                    counts, unusable=counts.unusable + 1, first_unusable=counts.first_unusable or str(error)
                )
                continue
            if not example.has_answer and data.empty_responses == "drop":
                self.counts = replace(counts, empty=counts.empty + 1)
            else:
                yield example


def maker_of_pairs(data: DataSection, make_pair: MakePair) -> Callable[[Record], Pair]:
    """The function that makes a pair of a record, for an `ExampleReader`."""
    return lambda record: Pair(record.location, *make_pair(record, data))


def maker_of_conversations(data: DataSection, make_pair: MakePair) -> Callable[[Record], Conversation]:
    """The function that makes a conversation of a record, for an `ExampleReader`. A pair makes two turns."""
    if data.format == "chat":
        return lambda record: read_conversation(record, data)
    return lambda record: conversation_of_pair(record.location, *make_pair(record, data))


def held_out_records(data: DataSection) -> Iterator[Record]:
    """The records of `data.eval_files`; none without.

    Raises:
        UserError: a file cannot be read.
    """
    return chain.from_iterable(_read_path(Path(name), data.split) for name in data.eval_files or [])


def source_records(data: DataSection) -> Iterator[Record]:
    """The records of the source.

    Raises:
        UserError: it cannot be read.
    """
    if data.docstrings is not None:
        return read_docstring_pairs(data.docstrings)
    if data.summaries is not None:
        return read_summary_pairs(data.summaries)
    if data.files is not None:
        return chain.from_iterable(_read_path(Path(name), data.split) for name in data.files)
    assert data.hub is not None
    return read_hub(data.hub, data.hub_configuration, data.split)


def _read_path(path: Path, split: str) -> Iterator[Record]:
    return read_saved_dataset(path, split) if path.is_dir() else read_file(path)
