"""Labels: what a model learns to predict."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label of a token that is not learned: transformers' and torch's losses leave it out."""


def count_labels(labels: "torch.Tensor") -> int:
    """The number of tokens that the loss of labels `[batch, sequence]` is the mean of.

    The first column does not count: nothing predicts it.
    """
    return int((labels[:, 1:] != IGNORED).sum())
