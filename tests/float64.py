"""Models of transformers in float64 throughout, for comparisons to more digits than float32 has."""

import torch
from torch.overrides import TorchFunctionMode


class exact_float64(TorchFunctionMode):
    """A context in which what asks for float32 gets float64.

    transformers computes norms, rotary angles and softmax in float32 whatever the type of a model, which leaves differences of
    1e-7 between two ways to compute the same. Recomputation of activations needs the context around the backward pass, too.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return function(*args, **kwargs)
