"""Rows of token ids and labels: kept, truncated or dropped, and counted for the log."""

from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from utils.config.data_section import DataSection
from utils.data.labels import IGNORED


class Outcome(IntEnum):
    """The outcome of an example."""

    KEPT = 0
    TRUNCATED = 1  # kept, without its end
    TOO_LONG = 2
    WITHOUT_LABEL = 3
    UNUSABLE = 4


KEPT = (Outcome.KEPT, Outcome.TRUNCATED)
"""The outcomes of rows that are trained on or evaluated."""


@dataclass(frozen=True)
class Row:
    """A pair or a conversation in token ids. Without ids if it is not kept."""

    location: str
    """The place of the example's record."""
    input_ids: list[int]
    """Token ids of all of it."""
    labels: list[int]
    """A label for each token: its id, or -100 if it is not learned."""
    prompt_length: int
    """The number of tokens before the response, or before the last answer, with which a sample begins."""
    outcome: Outcome = Outcome.KEPT
    """The outcome of the example."""
    problem: str = ""
    """The reason why the example is unusable."""
    unlearned_answers: int = 0
    """Number of the assistant's turns that have no labels because of their weight, or because they are empty."""


@dataclass(frozen=True)
class RowCounts:
    """The counts of examples, by outcome."""

    kept: int = 0
    """Rows to train on or to evaluate."""
    truncated: int = 0
    """Number of kept rows that lost their end."""
    dropped_too_long: int = 0
    """Examples dropped for their length."""
    dropped_without_label: int = 0
    """Examples dropped because all their labels were cut off: they would count as a loss of 0."""
    unusable: int = 0
    """Conversations skipped because the chat template cannot render them."""
    first_unusable: str = ""
    """The reason why the first of these was skipped."""
    unlearned_answers: int = 0
    """Number of the assistant's turns without labels in kept conversations."""

    def __str__(self) -> str:
        answers, unusable = "", ""
        if self.unlearned_answers:
            answers = (
                f"; turns without labels, since they are empty or say so (weight, train): {self.unlearned_answers}"
            )
        if self.unusable:
            unusable = f", {self.unusable} unusable, the first: {self.first_unusable}"
        return (
            f"{self.kept} kept ({self.truncated} of them truncated), {self.dropped_too_long} dropped for their length, "
            f"{self.dropped_without_label} dropped because no label was left{unusable}{answers}"
        )


def fit_row(row: Row, data: DataSection) -> Row:
    """The row as it is kept: cut to `data.max_length`, or without ids if it is dropped."""
    max_length = data.max_length
    is_too_long = len(row.input_ids) > max_length
    if is_too_long and data.too_long == "drop":
        return _dropped(row, Outcome.TOO_LONG)
    input_ids, labels = row.input_ids[:max_length], row.labels[:max_length]
    if all(label == IGNORED for label in labels[1:]):  # nothing predicts the first token
        return _dropped(row, Outcome.WITHOUT_LABEL)
    return replace(row, input_ids=input_ids, labels=labels, outcome=Outcome.TRUNCATED if is_too_long else Outcome.KEPT)


def unusable_row(location: str, problem: Exception) -> Row:
    """The row of an example that cannot be tokenized."""
    return Row(location, [], [], 0, Outcome.UNUSABLE, str(problem))


def count_rows(outcomes: NDArray[np.int8], first_unusable: str = "", unlearned_answers: int = 0) -> RowCounts:
    """The number of rows of each outcome."""
    counts = np.bincount(outcomes, minlength=len(Outcome)).tolist()
    return RowCounts(
        kept=counts[Outcome.KEPT] + counts[Outcome.TRUNCATED],
        truncated=counts[Outcome.TRUNCATED],
        dropped_too_long=counts[Outcome.TOO_LONG],
        dropped_without_label=counts[Outcome.WITHOUT_LABEL],
        unusable=counts[Outcome.UNUSABLE],
        first_unusable=first_unusable,
        unlearned_answers=unlearned_answers,
    )


def _dropped(row: Row, outcome: Outcome) -> Row:
    return Row(row.location, [], [], 0, outcome)
