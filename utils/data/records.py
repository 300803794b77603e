"""Records, the rows of a data source, and pairs, the texts that a training script makes of them."""

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from utils.config.schema import DataSection
from utils.errors import UserError


@dataclass(frozen=True)
class Record:
    """A row of a data source."""

    location: str
    """Where it was read, such as "pairs.jsonl:17"."""
    fields: Mapping[str, Any]
    """Values by field name, as the source has them."""

    def text(self, field: str) -> str:
        """The text of a field.

        Raises:
            UserError: there is no such field, or its value is not text.
        """
        if field not in self.fields:
            names = ", ".join(map(repr, self.fields)) or "none"
            raise UserError(f"{self.location}: no field {field!r}: the fields are {names}")
        value = self.fields[field]
        if not isinstance(value, str):
            shown = "empty" if value is None else repr(value)[:40]
            raise UserError(f"{self.location}: field {field!r} is {shown}, not a text")
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise UserError(f"{self.location}: field {field!r} has half of a surrogate pair, which is no character")
        return value

    def fill(self, template: str, *, prompt: str) -> str:
        """A template such as "Question: {prompt}", filled with the prompt and with the fields of this record.

        Raises:
            UserError: the template names a field that the record does not have, or whose value is not text.
        """
        fields = {name: self.text(name) for name in _names_in(template) if name != "prompt"}
        return template.format(prompt=prompt, **fields)


@cache
def _names_in(template: str) -> frozenset[str]:
    return frozenset(name for _, name, _, _ in string.Formatter().parse(template) if name)


# A function of the training script: given a record and the settings, the prompt and the response.
MakePair = Callable[[Record, DataSection], tuple[str, str]]


@dataclass(frozen=True)
class Pair:
    """A prompt and the response to learn."""

    location: str
    """Where the record was read."""
    prompt: str
    """All text before the response, template included."""
    response: str
    """The text to learn."""
