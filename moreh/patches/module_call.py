"""Runs code around calls of models: of the outermost module that a script calls.

Used by the accelerator's job, which counts activations, and by the runtime, which plans and computes the call.

Hooks of torch would not do: those that are registered on a model are seen by TorchScript, pickled with it and copied
with it, and none is called when Ctrl-C ends a forward pass, so that what a hook has switched on would stay on.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from moreh.patches.patch import Patch

# Takes the model and the arguments of the call; makes a context that is entered before the forward pass and left
# after it, however it ends.
MakeContext = Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], AbstractContextManager[Any]]
# Takes the model and its outputs after a forward pass without an error; returns the outputs for the script.
AfterCall = Callable[[torch.nn.Module, Any], Any]
# Takes the model and the arguments; returns the outputs in place of the module's own forward pass, or NotImplemented to
# let that happen.
InsteadOfCall = Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], Any]
# Takes a module that is called in a backward pass; raises an error if it may not be.
CheckCall = Callable[[torch.nn.Module], None]

MODULE_CALL = Patch(
    target="torch.nn.Module._call_impl",
    why="Plans and computes the outermost call of a model, whatever its class and whenever the model was created.",
    no_public_way="Hooks are seen by TorchScript, pickled and copied with the model, cannot replace a call's result "
    "without computing it, and none is called when Ctrl-C ends a forward pass.",
    tested=("torch 2.11", "torch 2.13", "torch 2.15"),
)

_instead: list[InsteadOfCall] = []
_around: list[tuple[MakeContext, AfterCall]] = []
_in_backward: list[CheckCall] = []
_inside = threading.local()


def around_model_calls(make_context: MakeContext, after: AfterCall) -> None:
    """From now on, use the context and the function for every outermost call of a module that has parameters."""
    _patch_module_call()
    _around.append((make_context, after))


def instead_of_model_calls(function: InsteadOfCall) -> None:
    """From now on, ask the function at every outermost call of a module that has parameters.

    Functions are asked in the order in which they were added, until one returns outputs.
    """
    _patch_module_call()
    _instead.append(function)


def before_calls_in_backward(check: CheckCall) -> None:
    """From now on, call the function before each module that a script calls in a backward pass, as recomputation does.

    No other function is asked about such a call, which the module's own forward pass computes.
    """
    _patch_module_call()
    _in_backward.append(check)


@contextmanager
def inside_of_call() -> Iterator[None]:
    """Let calls of modules behave as without the patch, like those within an outermost call."""
    before = getattr(_inside, "model_call", False)
    _inside.model_call = True
    try:
        yield
    finally:
        _inside.model_call = before


def _patch_module_call() -> None:
    """Install the patch unless it is active."""
    if not MODULE_CALL.is_active:
        MODULE_CALL.install(_make_call)


def _make_call(original: Any) -> Any:
    def call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        # A compiler traces the model's computation, not the hook around it.
        if torch.compiler.is_compiling() or getattr(_inside, "model_call", False):
            return original(self, *args, **kwargs)
        # In the backward pass, recomputation calls parts of a model by themselves.
        if _in_backward_pass():
            for check in _in_backward:
                check(self)
            return original(self, *args, **kwargs)
        if first_parameter(self) is None:
            return original(self, *args, **kwargs)
        _inside.model_call = True
        try:
            with ExitStack() as contexts:
                for make_context, _ in _around:
                    contexts.enter_context(make_context(self, args, kwargs))
                outputs = _ask_instead(self, args, kwargs)
                if outputs is NotImplemented:
                    outputs = original(self, *args, **kwargs)
            for _, after in _around:
                outputs = after(self, outputs)
        finally:
            _inside.model_call = False
        return outputs

    return call


def first_parameter(module: torch.nn.Module) -> torch.nn.Parameter | None:
    """The first parameter of a module, or None: `next(module.parameters(), None)` would take ten times as long."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for child in module._modules.values():
        if child is not None and (found := first_parameter(child)) is not None:
            return found
    return None


def _ask_instead(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The outputs of the first function that computes the call; NotImplemented if none does."""
    for function in _instead:
        outputs = function(module, args, kwargs)
        if outputs is not NotImplemented:
            return outputs
    return NotImplemented


def _in_backward_pass() -> bool:
    return torch._C._current_graph_task_id() != -1
