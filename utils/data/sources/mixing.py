"""The weights of data sources: held-out rows, and repetitions of training rows."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.config.data_section import DataSection
from utils.data.sources.reading import SourceCounts
from utils.errors import UserError


@dataclass(frozen=True)
class Mix:
    """The sources of examples, by their numbers in the settings. One source is a mix of one."""

    source_of: NDArray[np.int64]
    """The source of each example: `[examples]`. Below 0: it is of `data.eval_files`."""
    weights: NDArray[np.float64]
    """Number of times that each source's training rows are used in an epoch: `[sources]`."""

    def to_hold_out(self, counts: NDArray[np.int64], eval_rows: int) -> NDArray[np.int64]:
        """Number of rows that each source holds out of its `counts`, `[sources]`: together `eval_rows`.

        They are in the proportion of the rows that the sources train on, each counted once: of 1,000 with weight 0.1
        and 100 with weight 3, as many of the one as of the other.
        """
        shares = self.rows_once(counts)
        exact = eval_rows * shares / shares.sum()
        rows = np.floor(exact).astype(np.int64)
        largest_rest = np.argsort(rows - exact, kind="stable")[: eval_rows - rows.sum()]
        rows[largest_rest] += 1
        return rows

    def rows_once(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Number of different rows of each source that are used, of its `counts`: `[sources]`."""
        used: NDArray[np.float64] = counts.astype(np.float64) * np.minimum(self.weights, 1.0)
        return used

    def rows_of_epoch(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Indices of training rows, in random order, with each repeated or left out as the weight of its source says.

        Of `n` rows of a source with weight 2.5, each comes twice, and the first `n / 2`, rounded, once more.
        """
        if (self.weights == 1).all():
            return indices
        parts = []
        for number, weight in enumerate(self.weights):
            rows = indices[self.source_of[indices] == number]
            times, rest = divmod(float(weight), 1.0)
            parts += [*[rows] * int(times), rows[: int(np.floor(rest * len(rows) + 0.5))]]
        return np.concatenate(parts)

    def counts(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of examples of each source: `[sources]`."""
        sources = self.source_of[indices]
        return np.bincount(sources[sources >= 0], minlength=len(self.weights))


@dataclass(frozen=True)
class SourceRows:
    """The row counts of a source of a mix."""

    name: str
    """The source's place in the settings, with its name."""
    weight: float
    """Number of times that its training rows are used in an epoch."""
    read: dict[str, Any]
    """The fields of a `SourceCounts`."""
    training: int
    """Number of training rows, each counted once."""
    epoch: int
    """Number of rows in an epoch."""
    held_out: int
    """Number of held-out rows."""

    def text(self, epoch_rows: int) -> str:
        """The log line, for an epoch of `epoch_rows` rows."""
        return (
            f"Rows of {self.name}: {SourceCounts(**self.read)}; {self.held_out} held out, {self.training} to train on: "
            f"with weight {self.weight:g}, {self.epoch} of the epoch's {epoch_rows} ({self.epoch / epoch_rows:.1%})"
        )


def require_rows(mix: Mix, training: NDArray[np.int64], epoch: NDArray[np.int64]) -> None:
    """Refuse a mix in which a source has nothing to train on.

    Raises:
        UserError: all its rows are left out.
    """
    if len(mix.weights) == 1:
        return
    for number, (rows, trained) in enumerate(zip(mix.counts(training), mix.counts(epoch), strict=True)):
        if not trained:
            raise UserError(
                f"data.sources.{number}: none of its rows are left to train on: it has {rows} such rows, and its "
                f"weight is {mix.weights[number]:g}: give it more rows or a larger weight, or leave it out"
            )


def rows_of_sources(
    data: DataSection,
    read: Sequence[SourceCounts],
    mix: Mix,
    examples: NDArray[np.int64],
    kept: Mapping[str, NDArray[np.int64]],
    rows: Mapping[str, NDArray[np.int64]],
) -> list[SourceRows]:
    """The row counts of each source.

    Args:
        data: the section of the data.
        read: what each source gave.
        mix: the sources.
        examples: indices of those to train on and those that are held out.
        kept: indices of the rows that are left, `train` and `evaluation`.
        rows: those of an epoch, and those that are held out.
    """
    in_split = mix.counts(examples)
    columns = [mix.counts(kept["train"]), mix.counts(rows["train"]), mix.counts(rows["evaluation"])]
    result = []
    for number, (counts, section) in enumerate(zip(read, data.each_source(), strict=True)):
        key = next(key for key in section.ALTERNATIVES if getattr(section, key) is not None)
        value: str | list[str] = getattr(section, key)
        names = [value] if isinstance(value, str) else value
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        training, epoch, held_out = (int(column[number]) for column in columns)
        result.append(
            SourceRows(
                name=f"data.sources.{number} ({key}: {names[0]}{others})",
                weight=float(mix.weights[number]),
                read=asdict(replace(counts, duplicates=counts.used - int(in_split[number]))),
                training=training,
                epoch=epoch,
                held_out=held_out,
            )
        )
    return result
