"""Splits the examples of a run into training and held-out examples."""

import random
from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.data.sources.mixing import Mix
from utils.errors import UserError

# Rows held out where the settings do not say how many: a tenth of them, up to this number.
_MAX_EVAL_ROWS = 200


@dataclass(frozen=True)
class Split:
    """Indices of examples."""

    training: NDArray[np.int64]
    """The examples to train on, in an order that the seed decides."""
    held_out: NDArray[np.int64]
    """The held-out examples."""
    duplicates: int
    """Number of examples in neither part, since an earlier one is equal."""


def split_examples(
    digests: NDArray[np.uint64],
    eval_rows: int | None,
    seed: int,
    *,
    keeps_duplicates: bool,
    held_out: int | None = None,
    mix: Mix | None = None,
) -> Split:
    """Choose the held-out examples at random. Equal examples, where they are kept, are in the same part.

    The choice comes before a weight repeats or leaves out rows, so that no held-out example is trained on.

    Args:
        digests: a hash of each example: `[examples, 2]`.
        eval_rows: how many to hold out; None: a tenth, at most 200.
        seed: of the random choice.
        keeps_duplicates: whether an example that is equal to an earlier one is kept.
        held_out: if given, the first so many examples are held out, and no others; those equal to them are dropped.
        mix: the sources of the examples, which share the held-out ones; None: there is one source.

    Raises:
        UserError: no examples would be left to train on.
    """
    groups = _groups(digests)
    if not keeps_duplicates:
        groups = _Groups(groups.members[groups.starts], np.arange(len(groups.starts)), np.ones_like(groups.starts))
    if held_out is not None:
        training, evaluation = _hold_out_first(groups, held_out, seed)
    else:
        mix = mix or Mix(np.zeros(len(digests), np.int64), np.ones(1))
        training, evaluation = _hold_out_at_random(_shuffled(groups, seed), eval_rows, mix)
    return Split(training, evaluation, duplicates=len(digests) - len(training) - len(evaluation))


def _hold_out_first(groups: "_Groups", count: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The examples to train on, and the first `count` examples; those equal to one of these are in neither part."""
    is_held_out = groups.members[groups.starts] < count
    others = _Groups(groups.members, groups.starts[~is_held_out], groups.sizes[~is_held_out])
    training = _shuffled(others, seed).members
    if not len(training):
        raise UserError("data.eval_files: all rows of the source are equal to rows of these files")
    return training, np.sort(groups.members[groups.members < count])


def _hold_out_at_random(
    shuffled: "_Groups", eval_rows: int | None, mix: Mix
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The examples to train on, and the held-out ones: the first groups of each source."""
    source_of_group = mix.source_of[shuffled.members[shuffled.starts]]
    rows_of_source = np.bincount(source_of_group, shuffled.sizes, len(mix.weights)).astype(np.int64)
    count = int(mix.rows_once(rows_of_source).sum())
    if eval_rows is None:
        eval_rows = min(_MAX_EVAL_ROWS, max(1, count // 10))
    if eval_rows >= count:
        raise UserError(f"data.eval_rows: {eval_rows} rows are requested, but the data has only {count}")
    is_held_out = np.zeros(len(shuffled.sizes), bool)
    for source, rows in enumerate(mix.to_hold_out(rows_of_source, eval_rows)):
        if rows:
            groups_of_source = np.flatnonzero(source_of_group == source)
            ends = np.cumsum(shuffled.sizes[groups_of_source])
            is_held_out[groups_of_source[: np.searchsorted(ends, rows) + 1]] = True
    if is_held_out.all():
        raise UserError(
            f"data.eval_rows: with {eval_rows} rows held out, none are left for training, because equal rows stay "
            "together"
        )
    is_held_out_row = np.repeat(is_held_out, shuffled.sizes)
    return shuffled.members[~is_held_out_row], shuffled.members[is_held_out_row]


@dataclass(frozen=True)
class _Groups:
    """Groups of equal examples, in the order of their first members."""

    members: NDArray[np.int64]
    """Indices of examples; those of a group side by side, in their own order."""
    starts: NDArray[np.int64]
    """The start of each group in `members`."""
    sizes: NDArray[np.int64]
    """The size of each group."""


def _shuffled(groups: _Groups, seed: int) -> _Groups:
    """The groups in random order."""
    shuffled = array("q", range(len(groups.starts)))  # a list of Python's numbers would take five times the memory
    random.Random(seed).shuffle(shuffled)
    order = np.frombuffer(shuffled, np.int64)
    starts, sizes = groups.starts[order], groups.sizes[order]
    new_starts = np.cumsum(sizes) - sizes
    # Place i of the result is in a group g that begins there at new_starts[g].
    members = groups.members[np.repeat(starts - new_starts, sizes) + np.arange(sizes.sum())]
    return _Groups(members, new_starts, sizes)


def _groups(digests: NDArray[np.uint64]) -> _Groups:
    by_digest = np.lexsort((digests[:, 1], digests[:, 0]))  # a stable sort
    in_order = digests[by_digest]
    begins = np.ones(len(digests), bool)
    begins[1:] = (in_order[1:] != in_order[:-1]).any(axis=1)
    first = np.empty(len(digests), np.int64)
    first[by_digest] = by_digest[begins][np.cumsum(begins) - 1]
    members = np.argsort(first, kind="stable")
    _, starts, sizes = np.unique(first[members], return_index=True, return_counts=True)
    return _Groups(members, starts, sizes)
