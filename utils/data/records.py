"""Records, the rows of a data source, and pairs, the texts that a training script makes of them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from typing_extensions import Self

from utils.config.data_section import DataSection
from utils.config.source_section import template_names
from utils.errors import UserError, first_line
from utils.text.template import FilledPrompt, fill_template


class UnusableRow(UserError):
    """A row lacks a field, or the field is not a text."""


class SpelledNumber(float):
    """A number of a text file with its digits there: 2.50 is not 2.5."""

    text: str
    """The digits, as the file has them."""

    def __new__(cls, text: str) -> "SpelledNumber":  # noqa: D102
        number = super().__new__(cls, text)
        number.text = text
        return number


@dataclass(frozen=True)
class Record:
    """A row of a data source."""

    location: str
    """The place of the record, such as "pairs.jsonl:17"."""
    fields: Mapping[str, Any]
    """Values by field name, as the source has them."""

    numbers: str = "refuse"
    """`data.numbers`: "refuse" makes a number unusable, "text" makes it the text of its digits."""

    def text(self, field: str | None) -> str:
        """The text of a field; none is an empty text.

        Raises:
            UnusableRow: there is no such field, or its value is not a string.
        """
        if field is None:
            return ""
        value = self.value(field)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            if self.numbers == "text":
                return value.text if isinstance(value, SpelledNumber) else repr(value)
            raise self.unusable(f"field {field!r} is {value!r}, not a string: data.numbers=text reads its digits")
        if not isinstance(value, str):
            raise self.unusable(f"field {field!r} is {'empty' if value is None else repr(value)[:40]}, not a string")
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise self.unusable(f"field {field!r} has half of a surrogate pair, which is not a character")
        return value

    def fill(self, template: str, *, prompt: str) -> FilledPrompt:
        """A template such as "Question: {prompt}" with the prompt, and with fields of this record that it names.

        A field that is null there, as Alpaca's `input` may be, is empty.

        Raises:
            UnusableRow: there is no such field, or its value is not a string.
        """
        names = template_names(template) - {"prompt"}
        fields = {name: "" if self.value(name) is None else self.text(name) for name in names}
        return fill_template(template, {**fields, "prompt": prompt})

    def value(self, field: str) -> Any:
        """The value of a field, of any type.

        Raises:
            UnusableRow: there is no such field, or its value cannot be converted.
        """
        if field not in self.fields:
            names = ", ".join(map(repr, self.fields)) or "none"
            raise self.unusable(f"no field {field!r}: the fields are {names}")
        try:
            return self.fields[field]
        except (ValueError, OverflowError) as error:  # of a table: text that is not UTF-8, a date beyond Python's
            raise self.unusable(f"field {field!r} cannot be read: {first_line(error)}") from None

    def unusable(self, reason: str) -> UnusableRow:
        """The error that this record is not usable, with the place of the record."""
        return UnusableRow(f"{self.location}: {reason}")


# A function of the training script: given a record and the settings, the prompt and the response.
MakePair = Callable[[Record, DataSection], tuple[str, str]]


@dataclass(frozen=True)
class Pair:
    """A prompt and the response to learn."""

    location: str
    """The place of the record."""
    prompt: str
    """The text before the response, template included."""
    response: str
    """The text to learn."""

    @property
    def key(self) -> tuple[str, str]:
        """A key that is equal for equal pairs."""
        return self.prompt, self.response

    @property
    def content(self) -> list[Any]:
        """The fields but the location, as JSON values."""
        fields = self.prompt.fields if isinstance(self.prompt, FilledPrompt) else None
        return [self.prompt, fields, self.response]

    @classmethod
    def from_content(cls, location: str, content: list[Any]) -> Self:
        """The pair with this `content`."""
        prompt, fields, response = content
        if fields is not None:
            prompt = FilledPrompt(prompt, tuple(map(tuple, fields)))
        return cls(location, prompt, response)

    @property
    def text(self) -> str:
        """The whole text, for training a new tokenizer."""
        return self.prompt + self.response

    @property
    def has_answer(self) -> bool:
        """True if the response is not empty."""
        return bool(self.response)

    @property
    def has_empty_answer(self) -> bool:
        """True if the response is empty."""
        return not self.response
