"""Checks whether functions and modules are the libraries' own, or replaced by a script."""

import functools
import inspect
import os
import sysconfig
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
import transformers
import typing_extensions
from torch import nn
from torch.amp import autocast_mode
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

# The packages whose modules a model of transformers consists of, with adapters or without.
LIBRARIES = ("torch.nn.", "transformers.", "peft.")
_TRANSFORMERS_DIRECTORY = str(Path(transformers.__file__).parent)
# Functions of these directories may be in modules and classes of transformers, torch and PEFT. What a package for
# faster kernels puts there is the script's choice.
_LIBRARY_DIRECTORIES = tuple(
    f"{directory}{os.sep}"
    for directory in (
        _TRANSFORMERS_DIRECTORY,
        str(Path(torch.__file__).parent),
        str(Path(__file__).parent.parent),
        *(str(Path(_TRANSFORMERS_DIRECTORY).parent / name) for name in ("peft", "accelerate")),
    )
)
# Its `deprecated` wraps functions of torch; the wrapped function is checked as well.
_DEPRECATION_FILE = str(typing_extensions.__file__)
_LIBRARY_PACKAGES = frozenset(
    {"accelerate", "builtins", "functools", "moreh", "numpy", "packaging", "peft", "torch", "transformers", "typing"}
)
_PYTHON_DIRECTORY = f"{sysconfig.get_paths()['stdlib']}{os.sep}"
_FUNCTION_TYPES = (FunctionType, MethodType)
# The attributes that torch gives to each module: its parameters, hooks and the like.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_AUTOCAST_FILE = str(autocast_mode.__file__)
# The end of the file with accelerate's wrapper that converts outputs from bfloat16 to float32.
_ACCELERATE_FILE = str(Path("accelerate") / "utils" / "operations.py")


def is_stock_transformers(function: Callable[..., Any]) -> bool:
    """True if a function and all that it wraps come from transformers.

    A script's wrapper takes the name of what it wraps (`functools.wraps`), but not its file.
    """
    return all(_file_of(inner).startswith(_TRANSFORMERS_DIRECTORY) for inner in wrapped_chain(function))


def is_library_function(function: Any) -> bool:
    """True if a function, or another callable, and all that it wraps come from the libraries, Python or this package.

    One that was written in C is taken for theirs.
    """
    if isinstance(function, functools.partial):
        return False
    if isinstance(function, MethodType):
        owner = function.__self__ if isinstance(function.__self__, type) else type(function.__self__)
        if owner.__module__.partition(".")[0] not in _LIBRARY_PACKAGES:
            return False
    return all(_is_in_library(inner) for inner in wrapped_chain(function))


def is_accelerate_bf16_forward(module: nn.Module) -> bool:
    """True if a module's `forward` is its class's in accelerate's bfloat16 wrapper, as with `Trainer(bf16=True)`."""
    for function in wrapped_chain(module.forward):
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
    """The first module of a class of the script's own, or whose methods the script has replaced; None without any.

    The `forward` of `model` itself is not checked.
    """
    for module in model.modules():
        if not type(module).__module__.startswith(LIBRARIES):
            return module
        if module is not model and not is_library_function(type(module).forward):
            return module
        for name, value in vars(module).items():
            # Whether the loss is known is asked elsewhere.
            if module is model and name in ("forward", "_loss_function"):
                continue
            if name in ("forward", "_compiled_call_impl") and value is not None:
                return module
            if isinstance(value, functools.partial):
                value = value.func
            if isinstance(value, _FUNCTION_TYPES) and not is_library_function(value):
                return module
    return None


def whole_batch_norm(model: nn.Module) -> str | None:
    """A normalization in a model that depends on the whole batch, as a clause for messages; None if there is none.

    With batch normalization the sequences of a batch affect each other. Running statistics and the estimate of a
    spectral norm change once in each call, not once in each part of it.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return "batch normalization, which depends on how a batch is cut"
        if getattr(module, "track_running_stats", False):
            return f"running statistics ({type(module).__name__}), which depend on how a batch is cut"
        hooks = module._forward_pre_hooks.values()
        if isinstance(module, _SpectralNorm) or any(isinstance(hook, SpectralNorm) for hook in hooks):
            return "spectral normalization, which changes with each pass over a part of a batch"
    return None


def forward_counts(model: nn.Module) -> dict[str, list[Any]]:
    """The attributes, by name, in which modules of the script's own may count or keep something in a forward pass.

    These are numbers, texts, lists and dictionaries, results with a history, and the versions of buffers.
    """
    counts: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        # FSDP gives modules a class of its own.
        classes = (base for base in type(module).__mro__ if not base.__module__.startswith("torch.distributed."))
        if not next(classes).__module__.startswith(LIBRARIES):
            own = {key: _content(value) for key, value in vars(module).items() if key not in _OF_EVERY_MODULE}
            buffers = [(id(buffer), buffer._version) for buffer in module._buffers.values() if buffer is not None]
            counts[name] = [own, buffers]
    return counts


def _content(value: Any) -> Any:
    """A value that changes when a module counts in an attribute or keeps a result in it; None for other attributes.

    Tensors without a history may be caches of constants, such as rotary angles.
    """
    if isinstance(value, int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        return None if value.grad_fn is None else id(value)
    if isinstance(value, Mapping | Sequence | Set | deque):
        items = value.values() if isinstance(value, Mapping) else value
        return len(value), [item for item in items if isinstance(item, int | float)]
    return None


def wrapped_chain(function: Any) -> Iterator[Any]:
    """A function and the chain of functions that it wraps (`__wrapped__`); bound methods as plain functions."""
    while function is not None:
        function = getattr(function, "__func__", function)
        yield function
        function = getattr(function, "__wrapped__", None)


def _is_in_library(function: Any) -> bool:
    """True if a function itself, not the functions that it wraps, comes from a library."""
    if not isinstance(function, FunctionType):
        return type(function).__module__.partition(".")[0] in _LIBRARY_PACKAGES and not isinstance(
            function, torch.jit.ScriptFunction
        )
    file = function.__code__.co_filename
    if file.startswith(_PYTHON_DIRECTORY):
        return "site-packages" not in file or file == _DEPRECATION_FILE or file.startswith(_LIBRARY_DIRECTORIES)
    return file == _DEPRECATION_FILE or file.startswith((*_LIBRARY_DIRECTORIES, "<frozen "))


def _file_of(function: Any) -> str:
    """The file that a function, or the class of a callable object, was compiled from; empty for built-in ones."""
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return "" if code is None else code.co_filename
