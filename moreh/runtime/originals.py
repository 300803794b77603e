"""Whether functions and modules are those of the libraries, or what a script has put in their places."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from torch import nn

_TRANSFORMERS = str(Path(transformers.__file__).parent)
# Of what modules a model of transformers is made, with or without adapters.
LIBRARIES = ("torch.nn.", "transformers.", "peft.")


def is_of_transformers(function: Callable[..., Any]) -> bool:
    """Whether a function and whatever it is wrapped in come from transformers.

    Wrappers of a script take the names of what they wrap (`functools.wraps`), but not its file.
    """
    while True:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(_TRANSFORMERS):
            return False
        if not hasattr(function, "__wrapped__"):
            return True
        function = function.__wrapped__


def module_of_its_own(model: nn.Module) -> nn.Module | None:
    """A module in a model of transformers that a script has put there or whose forward pass it has replaced; None without.

    Batch normalization is one: no model here has it, and what it computes depends on how a batch is cut.
    """
    for module in model.modules():
        own = not type(module).__module__.startswith(LIBRARIES)
        if own or "forward" in module.__dict__ or isinstance(module, nn.modules.batchnorm._BatchNorm):
            return module
    return None
