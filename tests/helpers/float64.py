"""Models of transformers in float64 throughout, for comparisons to more digits than float32 has."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch


@contextmanager
def exact_float64():
    """In this context, code that asks torch for float32 gets float64, in recomputations during a backward pass as well.

    transformers computes norms, rotary angles and softmax in float32 whatever the type of a model, which leaves
    differences of 1e-7 between two ways to compute the same.
    """
    with ExitStack() as patches:
        for name in ("float32", "float"):
            patches.enter_context(mock.patch.object(torch, name, torch.float64))
        patches.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        yield
