"""The sharded models of this process, found by a module, by parameters or by gradients."""

import weakref
from collections.abc import Callable

from torch import nn

from moreh.errors import OptionError
from moreh.models.introspection import unwrapped
from moreh.runtime.engine.model_runner import ModelRunner

# Keys in the `__dict__` of modules: the runner of a sharded model, in the model; a weak reference to the sharded model,
# in the model of transformers that it wraps; a mark, in the sharded model and in each of its modules.
_RUNNER = "_moreh_runner"
_WHOLE = "_moreh_whole_model"
_IS_SHARDED = "_moreh_is_sharded"
_runners: weakref.WeakSet[ModelRunner] = weakref.WeakSet()


def register(root: nn.Module, runner: ModelRunner) -> None:
    """Register a model that has been sharded."""
    _runners.add(runner)
    root.__dict__[_RUNNER] = runner
    if unwrapped(root) is not root:
        unwrapped(root).__dict__[_WHOLE] = weakref.ref(root)
    for module in root.modules():
        module.__dict__[_IS_SHARDED] = True


def runner_of(root: nn.Module) -> ModelRunner | None:
    """The runner of a sharded model; None if the model is not sharded."""
    return root.__dict__.get(_RUNNER)


def runners_with(has: Callable[[nn.Parameter], bool]) -> list[ModelRunner]:
    """The runners of the sharded models that have a parameter for which `has` is true."""
    return [runner for runner in _runners if any(map(has, runner.model.user_params.values()))]


def whole_model(module: nn.Module) -> nn.Module:
    """The sharded model that wraps a model of transformers; for any other module, the module itself.

    A call of the wrapped model computes the same: PEFT's `generate`, for example, calls it. So does a call of what
    `torch.compile` makes of a sharded model.
    """
    compiled = module._modules.get("_orig_mod")
    if compiled is not None and _RUNNER not in module.__dict__ and _is_sharded(compiled):
        module = compiled
    reference = module.__dict__.get(_WHOLE)
    root = None if reference is None else reference()
    return module if root is None else root


def check_not_sharded(root: nn.Module) -> None:
    """Check that no part of a model has been sharded as a model of its own.

    Raises:
        OptionError: a script has put a sharded model into a wrapper.
    """
    if any(map(_is_sharded, root.modules())):
        name = type(root).__name__
        raise OptionError(
            f"a {name} was made of a model that is sharded over workers: make the {name} before the model's first "
            "training step, or save the model with save_pretrained and load that, or run on 1 worker (MOREH_WORKERS=1)"
        )


def _is_sharded(module: nn.Module) -> bool:
    return _IS_SHARDED in module.__dict__


def is_submodule_of_sharded(module: nn.Module) -> bool:
    """True if a module is a part of a sharded model, but not the model itself."""
    return _is_sharded(module) and _RUNNER not in module.__dict__
