"""Whether functions and modules are those of the libraries, or a script has replaced them."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.amp import autocast_mode

# The packages whose modules a model of transformers consists of, with adapters or without.
LIBRARIES = ("torch.nn.", "transformers.", "peft.")
_TRANSFORMERS_DIRECTORY = str(Path(transformers.__file__).parent)
_AUTOCAST_FILE = str(autocast_mode.__file__)
# The end of the file with accelerate's wrapper that converts outputs from bfloat16 to float32.
_ACCELERATE_FILE = str(Path("accelerate") / "utils" / "operations.py")


def is_stock_transformers(function: Callable[..., Any]) -> bool:
    """Whether a function and all that it wraps come from transformers.

    A script's wrapper takes the name of what it wraps (`functools.wraps`), but not its file.
    """
    return all(_file_of(inner).startswith(_TRANSFORMERS_DIRECTORY) for inner in _wrapped_chain(function))


def is_accelerate_bf16_forward(module: nn.Module) -> bool:
    """Whether a module's `forward` is its class's in accelerate's bfloat16 wrapper, as with `Trainer(bf16=True)`."""
    for function in _wrapped_chain(module.forward):
        if function is type(module).forward:
            return True
        if _file_of(function) == _AUTOCAST_FILE:
            context = inspect.getclosurevars(function).nonlocals["autocast_instance"]
            if context.fast_dtype != torch.bfloat16:
                return False
        elif not _file_of(function).endswith(_ACCELERATE_FILE):
            return False
    return False


def first_custom_module(model: nn.Module) -> nn.Module | None:
    """The first module of a class of the script's own, or whose `forward` the script has replaced; None without any.

    The `forward` of `model` itself is not checked.
    """
    for module in model.modules():
        is_custom = not type(module).__module__.startswith(LIBRARIES)
        if is_custom or (module is not model and "forward" in module.__dict__):
            return module
    return None


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a script has put batch normalization into a model, so that the sequences of a batch affect each other."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def _wrapped_chain(function: Any) -> Iterator[Any]:
    """A function, what it wraps (`__wrapped__`), what that wraps, and so on; bound methods as plain functions."""
    while function is not None:
        function = getattr(function, "__func__", function)
        yield function
        function = getattr(function, "__wrapped__", None)


def _file_of(function: Any) -> str:
    """The file that a function, or the class of a callable object, was compiled from; empty for built-in ones."""
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return "" if code is None else code.co_filename
