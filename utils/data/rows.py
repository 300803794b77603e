"""Rows of token ids and labels: which are kept, cut or dropped, and what the log says about them."""

from dataclasses import dataclass, field

from utils.config.data_section import DataSection
from utils.data.labels import IGNORED


@dataclass(frozen=True)
class Row:
    """A pair or a conversation in token ids."""

    location: str
    """Where its record was read."""
    input_ids: list[int]
    """Token ids of all of it."""
    labels: list[int]
    """A label for each token: its id, or -100 if it is not learned."""
    prompt_length: int
    """The number of tokens before the response, or before the last answer, with which a sample begins."""


@dataclass(frozen=True)
class RowCounts:
    """What became of the pairs."""

    kept: int = 0
    """Rows to train on or to evaluate."""
    truncated: int = 0
    """How many of the kept rows lost their end."""
    dropped_too_long: int = 0
    """Pairs dropped for their length."""
    dropped_without_label: int = 0
    """Pairs dropped because all their labels were cut off: they would count as a loss of 0."""
    unusable: int = 0
    """Conversations skipped because the chat template cannot render them."""
    first_unusable: str = ""
    """Why the first of these was skipped."""
    notes: list[str] = field(default_factory=list)
    """What the log says about control tokens in the texts, a line each."""

    def __str__(self) -> str:
        unusable = f", {self.unusable} unusable, the first: {self.first_unusable}" if self.unusable else ""
        return (
            f"{self.kept} kept ({self.truncated} of them truncated), {self.dropped_too_long} dropped for their length, "
            f"{self.dropped_without_label} dropped because no label was left{unusable}"
        )


class RowCollector:
    """Cuts or drops the rows that are longer than `data.max_length`, drops those without a label, and counts them."""

    def __init__(self, data: DataSection) -> None:
        self.rows: list[Row] = []
        """The rows that are kept."""
        self._data = data
        self._truncated = self._too_long = self._without_label = self._unusable = 0
        self._first_unusable = ""

    def add(self, row: Row) -> None:
        """Keep a row, cut it, or drop it."""
        max_length = self._data.max_length
        is_too_long = len(row.input_ids) > max_length
        if is_too_long and self._data.too_long == "drop":
            self._too_long += 1
            return
        input_ids, labels = row.input_ids[:max_length], row.labels[:max_length]
        if all(label == IGNORED for label in labels[1:]):  # nothing predicts the first token
            self._without_label += 1
            return
        self._truncated += is_too_long
        self.rows.append(Row(row.location, input_ids, labels, row.prompt_length))

    def skip(self, error: Exception) -> None:
        """Count a row that cannot be made."""
        self._unusable, self._first_unusable = self._unusable + 1, self._first_unusable or str(error)

    def counts(self, notes: list[str]) -> RowCounts:
        """What became of all rows, with lines for the log."""
        return RowCounts(
            len(self.rows),
            self._truncated,
            self._too_long,
            self._without_label,
            self._unusable,
            self._first_unusable,
            notes,
        )
