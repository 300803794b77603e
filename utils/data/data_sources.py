"""Reads the pairs of a run from the source that its settings name."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from utils.config.schema import DataSection
from utils.data.docstring_pairs import read_docstring_pairs
from utils.data.file_readers import read_file, read_hub
from utils.data.records import MakePair, Pair, Record
from utils.data.summary_pairs import read_summary_pairs


def read_pairs(data: DataSection, make_pair: MakePair) -> list[Pair]:
    """The pairs that `make_pair` makes of the source's records, in their order, without duplicates.

    Raises:
        UserError: the source cannot be read, or a record has no text in a field that is needed.
    """
    pairs = (Pair(record.location, *make_pair(record, data)) for record in _read_records(data))
    # Of two equal pairs, one could be held out for evaluation while the other is trained on.
    return list({(pair.prompt, pair.response): pair for pair in pairs}.values())


def _read_records(data: DataSection) -> Iterator[Record]:
    if data.docstrings is not None:
        return read_docstring_pairs(data.docstrings)
    if data.summaries is not None:
        return read_summary_pairs(data.summaries)
    if data.files is not None:
        return chain.from_iterable(read_file(Path(name)) for name in data.files)
    assert data.hub is not None
    return read_hub(data.hub, data.hub_configuration, data.split)
