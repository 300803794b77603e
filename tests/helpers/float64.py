"""Models of transformers in float64 throughout, for comparisons to more digits than float32 has."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

# torch keeps these tables for good once they are made, and in the context below they would lack float32.
torch.storage._dtype_to_storage_type_map()
torch.storage._storage_type_to_dtype_map()


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
