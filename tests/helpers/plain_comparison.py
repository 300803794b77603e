"""A piece of a script, run twice on equal models: with the fast path of one worker, and as plain transformers."""

from collections.abc import Callable
from typing import Any

import torch

from moreh.options import DEFAULT_OPTIONS, ParallelOptions
from moreh.runtime.engine.fast_path import FastPath
from tests.helpers.compare import worst
from tests.helpers.fast_path_cases import MAX_TOKENS, batch, gradients
from tests.helpers.float64 import exact_float64
from tests.helpers.models.families import make_model

Call = Callable[..., Any]
Script = Callable[[Any, Call], Any]


class FastCalls:
    """Calls a model with its fast path; one that steps aside is computed by the model's own forward pass."""

    def __init__(self, options: ParallelOptions = DEFAULT_OPTIONS) -> None:
        self.fast_path = FastPath(options)
        self.took: list[bool] = []
        """Of each call with labels, whether the fast path computed it."""

    def __call__(self, model: Any, **inputs: Any) -> Any:
        """The outputs of a call with the inputs; those of a batch with prompts and padding if there are none."""
        inputs = inputs or batch(_causal(model))
        outputs = self.fast_path.call(model, (), inputs, MAX_TOKENS)
        self.took.append(outputs is not NotImplemented)
        return outputs if self.took[-1] else model(**inputs)


def plain_call(model: Any, **inputs: Any) -> Any:
    """The outputs of `FastCalls` in plain transformers."""
    return model(**(inputs or batch(_causal(model))))


def compare(script: Script, make: Callable[[], Any] = lambda: make_model("llama")) -> tuple[float, list[bool]]:
    """The worst difference in what a script returns and in the gradients it leaves, and which calls were fast.

    The script is called with a model and with the function that calls models.
    """
    calls = FastCalls()
    results = []
    for call in (plain_call, calls):
        with exact_float64():
            torch.manual_seed(0)
            model = make()
            returned = script(model, call)
            numbers = {} if returned is None else {"returned": torch.as_tensor(returned).detach().clone()}
            results.append(numbers | gradients(model))
    expected, actual = results
    assert actual.keys() == expected.keys(), f"gradients of {sorted(actual.keys() ^ expected.keys())[:5]}"
    floor = max(float(tensor.abs().max()) for tensor in expected.values())
    return worst(float((actual[n] - expected[n]).abs().max()) / floor for n in expected), calls.took


def _causal(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
