"""Batches for tiny models, and how many of their label positions reach the output layer."""

from contextlib import contextmanager
from unittest import mock

import torch

from moreh.runtime.batch import micro_batches

ROWS, LENGTH = 8, 12
PREFIX_LEN = 5


@contextmanager
def label_positions_rounded_to(multiple):
    """Round the number of positions that reach the output layer up to a multiple of this.

    With the multiple of production, 64, the label positions of short rows would be all positions.
    """
    with mock.patch.object(micro_batches, "POSITIONS_MULTIPLE", multiple):
        yield


def batch(step, vocabulary, rows=ROWS, length=LENGTH):
    """Ids, mask and labels of rows of different lengths, of which the first token is not a label."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    lengths = torch.randint(3, length + 1, (rows,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    return ids, mask, labels


def long_batch(step, vocabulary):
    """Rows so long that the multiple of production leaves positions out, with labels at a third of them."""
    ids, mask, labels = batch(step, vocabulary, length=96)
    return ids, mask, labels.masked_fill(torch.arange(96) % 3 > 0, -100)


def batch_with_shared_prefix(step, vocabulary):
    """Rows that begin with the same tokens, which are not labels."""
    ids, mask, labels = batch(step, vocabulary)
    prefix = torch.arange(PREFIX_LEN).expand(ROWS, PREFIX_LEN)
    return tuple(
        torch.cat(pair, 1) for pair in ((prefix, ids), (torch.ones_like(prefix), mask), (0 * prefix - 100, labels))
    )
