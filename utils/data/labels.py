"""Labels: the tokens that a model learns to predict."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label of a token that is not learned: transformers' and torch's losses leave it out."""


def count_labels(labels: "torch.Tensor") -> int:
    """The number of label tokens in labels `[batch, sequence]`, over which the loss is the mean.

    The first column does not count, because no position predicts it.

    >>> import torch
    >>> count_labels(torch.tensor([[7, 8, 9, IGNORED], [IGNORED, IGNORED, 4, 5]]))
    4
    """
    return int((labels[:, 1:] != IGNORED).sum())
