"""Which examples of a run are trained on, and which are held out."""

import random
from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.errors import UserError

# Rows held out where the settings do not say how many: a tenth of them, up to this number.
_MAX_EVAL_ROWS = 200


@dataclass(frozen=True)
class Split:
    """Indices of examples."""

    training: NDArray[np.int64]
    """Those to train on, in an order that the seed decides."""
    held_out: NDArray[np.int64]
    """Those that are held out."""
    duplicates: int
    """How many are in neither, since an earlier one is equal."""


def split_examples(
    digests: NDArray[np.uint64],
    eval_rows: int | None,
    seed: int,
    *,
    keeps_duplicates: bool,
    held_out: int | None = None,
) -> Split:
    """Choose the held-out examples at random. Equal ones, where they are kept, are on the same side.

    Args:
        digests: a hash of each example: `[examples, 2]`.
        eval_rows: how many to hold out; None: a tenth, at most 200.
        seed: of the random choice.
        keeps_duplicates: whether an example that is equal to an earlier one is kept.
        held_out: if given, the first so many examples are held out, and no others; those equal to them are dropped.

    Raises:
        UserError: no examples would be left to train on.
    """
    groups = _groups(digests)
    if not keeps_duplicates:
        groups = _Groups(groups.members[groups.starts], np.arange(len(groups.starts)), np.ones_like(groups.starts))
    if held_out is not None:
        is_held_out = groups.members[groups.starts] < held_out
        others = _Groups(groups.members, groups.starts[~is_held_out], groups.sizes[~is_held_out])
        training, _ = _shuffled(others, seed)
        evaluation = np.sort(groups.members[groups.members < held_out])
        if not len(training):
            raise UserError("data.eval_files: all rows of the source are equal to rows of these files")
    else:
        indices, ends = _shuffled(groups, seed)
        count = len(indices)
        if eval_rows is None:
            eval_rows = min(_MAX_EVAL_ROWS, max(1, count // 10))
        if eval_rows >= count:
            raise UserError(f"data.eval_rows: {eval_rows} rows are to be held out, but the data has only {count}")
        cut = int(ends[np.searchsorted(ends, eval_rows)])
        if cut == count:
            raise UserError(
                f"data.eval_rows: with {eval_rows} rows held out, none are left to train on: equal ones go along"
            )
        training, evaluation = indices[cut:], indices[:cut]
    return Split(training, evaluation, duplicates=len(digests) - len(training) - len(evaluation))


@dataclass(frozen=True)
class _Groups:
    """Groups of equal examples, in the order of their first members."""

    members: NDArray[np.int64]
    """Indices of examples; those of a group side by side, in their own order."""
    starts: NDArray[np.int64]
    """Where each group begins in `members`."""
    sizes: NDArray[np.int64]
    """How many members each group has."""


def _shuffled(groups: _Groups, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The members of all groups, the groups shuffled, and where each group ends among them."""
    shuffled = array("q", range(len(groups.starts)))  # a list of Python's numbers would take five times the memory
    random.Random(seed).shuffle(shuffled)
    order = np.frombuffer(shuffled, np.int64)
    starts, sizes = groups.starts[order], groups.sizes[order]
    ends = np.cumsum(sizes)
    # Place i of the result is in a group g that begins there at ends[g] - sizes[g].
    return groups.members[np.repeat(starts - ends + sizes, sizes) + np.arange(sizes.sum())], ends


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
