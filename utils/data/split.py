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


def split_examples(digests: NDArray[np.uint64], eval_rows: int | None, seed: int, *, keeps_duplicates: bool) -> Split:
    """Choose the held-out examples at random. Equal ones, where they are kept, are on the same side.

    Args:
        digests: a hash of each example: `[examples, 2]`.
        eval_rows: how many to hold out; None: a tenth, at most 200.
        seed: of the random choice.
        keeps_duplicates: whether an example that is equal to an earlier one is kept.

    Raises:
        UserError: no examples would be left to train on.
    """
    members, starts, sizes = _groups(digests)
    if not keeps_duplicates:
        members, starts = members[starts], np.arange(len(starts))
        sizes = np.ones_like(starts)
    count = len(members)
    if eval_rows is None:
        eval_rows = min(_MAX_EVAL_ROWS, max(1, count // 10))
    if eval_rows >= count:
        raise UserError(f"data.eval_rows: {eval_rows} rows are to be held out, but the data has only {count}")
    shuffled = array("q", range(len(starts)))  # a list of Python's numbers would take five times the memory
    random.Random(seed).shuffle(shuffled)
    order = np.frombuffer(shuffled, np.int64)
    ends = np.cumsum(sizes[order])
    # Place i of the result is in group g of `order`, which begins there at ends[g] - its size.
    indices = members[np.repeat(starts[order] - ends + sizes[order], sizes[order]) + np.arange(count)]
    cut = int(ends[np.searchsorted(ends, eval_rows)])
    if cut == count:
        raise UserError(
            f"data.eval_rows: with {eval_rows} rows held out, none are left to train on: equal ones go along"
        )
    return Split(training=indices[cut:], held_out=indices[:cut], duplicates=len(digests) - count)


def _groups(digests: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Indices in groups of equal digests, and where each group begins and how many it has.

    Groups are in the order of their first members, and members in their own order.
    """
    by_digest = np.lexsort((digests[:, 1], digests[:, 0]))  # a stable sort
    in_order = digests[by_digest]
    begins = np.ones(len(digests), bool)
    begins[1:] = (in_order[1:] != in_order[:-1]).any(axis=1)
    first = np.empty(len(digests), np.int64)
    first[by_digest] = by_digest[begins][np.cumsum(begins) - 1]
    members = np.argsort(first, kind="stable")
    _, starts, sizes = np.unique(first[members], return_index=True, return_counts=True)
    return members, starts, sizes
