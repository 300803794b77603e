"""The data of a run as pairs of texts, prompt and response, whatever they come from."""

import string
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from utils.config.schema import DataSection
from utils.data.docstring_pairs import read_docstring_pairs
from utils.data.file_readers import Record, read_file, read_hub
from utils.data.summary_pairs import read_summary_pairs
from utils.errors import UserError


@dataclass(frozen=True)
class Pair:
    """A prompt, already in the template, and the response that is to be learned. `place` is where it was read."""

    place: str
    prompt: str
    response: str


def read_pairs(data: DataSection) -> list[Pair]:
    """All different pairs of the run's data, in the order of their source.

    Raises:
        UserError: the source cannot be read, or a row has no text in a field that is needed.
    """
    fields = {name for _, name, _, _ in string.Formatter().parse(data.template) if name}
    # Equal pairs are kept once: a copy could be held out for evaluation and yet be seen in training.
    pairs = (_to_pair(place, row, data, fields - {"prompt"}) for place, row in _records(data))
    return list({(pair.prompt, pair.response): pair for pair in pairs}.values())


def _records(data: DataSection) -> Iterator[Record]:
    if data.docstrings is not None:
        return read_docstring_pairs(data.docstrings)
    if data.summaries is not None:
        return read_summary_pairs(data.summaries)
    if data.files is not None:
        return chain.from_iterable(read_file(Path(name)) for name in data.files)
    assert data.hub is not None
    return read_hub(data.hub, data.hub_configuration, data.split)


def _to_pair(place: str, row: dict[str, Any], data: DataSection, other_fields: set[str]) -> Pair:
    values = {name: _text(place, row, name) for name in other_fields}
    values["prompt"] = _text(place, row, data.prompt_field)
    response = _text(place, row, data.response_field)
    return Pair(place, data.template.format_map(values), response)


def _text(place: str, row: dict[str, Any], field: str) -> str:
    if field not in row:
        raise UserError(f"{place}: no field {field!r}: the fields are {', '.join(map(repr, row)) or 'none'}")
    value = row[field]
    if not isinstance(value, str):
        raise UserError(f"{place}: field {field!r} is {'empty' if value is None else repr(value)[:40]}, not a text")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{place}: field {field!r} holds half of a surrogate pair, which is no character")
    return value
