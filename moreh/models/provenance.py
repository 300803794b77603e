"""Whether functions and modules are those of the libraries, or what a script has put in their places."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.amp import autocast_mode

# Of what modules a model of transformers is made, with or without adapters.
LIBRARIES = ("torch.nn.", "transformers.", "peft.")
_TRANSFORMERS = str(Path(transformers.__file__).parent)
_AUTOCAST = str(autocast_mode.__file__)
# Accelerate converts outputs in bfloat16 to float32.
_ACCELERATE = str(Path("accelerate") / "utils" / "operations.py")


def is_stock_transformers(function: Callable[..., Any]) -> bool:
    """Whether a function and whatever it is wrapped in come from transformers.

    Wrappers of a script take the names of what they wrap (`functools.wraps`), but not its file.
    """
    return all(_file_of(one).startswith(_TRANSFORMERS) for one in _layers(function))


def is_accelerate_bf16_forward(module: nn.Module) -> bool:
    """Whether a module's own forward pass is that of its class in accelerate's wrapper, as with `Trainer` and `bf16=True`."""
    for one in _layers(module.forward):
        if one is type(module).forward:
            return True
        if _file_of(one) == _AUTOCAST:
            context = inspect.getclosurevars(one).nonlocals["autocast_instance"]
            if context.fast_dtype != torch.bfloat16:
                return False
        elif not _file_of(one).endswith(_ACCELERATE):
            return False
    return False


def first_custom_module(model: nn.Module) -> nn.Module | None:
    """A module in a model of transformers that a script has put there or whose forward pass it has replaced; None without."""
    for module in model.modules():
        own = not type(module).__module__.startswith(LIBRARIES)
        if own or (module is not model and "forward" in module.__dict__):
            return module
    return None


def has_batch_norm(model: nn.Module) -> bool:
    """Whether what a model computes of a row depends on the others: batch normalization, put there by a script."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def _layers(function: Any) -> Iterator[Any]:
    """A function and what it wraps, one in the other."""
    while function is not None:
        function = getattr(function, "__func__", function)
        yield function
        function = getattr(function, "__wrapped__", None)


def _file_of(function: Any) -> str:
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return "" if code is None else code.co_filename
