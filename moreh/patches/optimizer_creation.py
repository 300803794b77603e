"""Calls functions with every new optimizer of any class.

The engine chooses fused kernels for new optimizers, refuses those that cannot work on sharded parameters, and gives the
others the parameters of a model that is sharded after they were made.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch

from moreh.patches.patch import Patch

# Called with an optimizer. It may raise, and must do nothing the second time: it can be called again for the same one.
OptimizerCallback = Callable[[torch.optim.Optimizer], None]

OPTIMIZER_CREATION = Patch(
    target="torch.optim.Optimizer.__init__",
    why="Registers every optimizer when it is created: chooses its kernels, replaces its parameters when their model "
    "is sharded, and refuses one that would be wrong on shards on the line that creates it.",
    no_public_way="register_optimizer_step_pre_hook is called at the first step. By then a script has clipped, saved "
    "or resumed with the parameters and settings in the optimizer's groups.",
    tested=("torch 2.11", "torch 2.13", "torch 2.15"),
)

_callbacks: list[OptimizerCallback] = []
_optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def on_optimizer_created(callback: OptimizerCallback) -> None:
    """Call a function with each optimizer that is made from now on."""
    if not OPTIMIZER_CREATION.is_active:
        OPTIMIZER_CREATION.install(_make_init)
    _callbacks.append(callback)


def existing_optimizers() -> list[torch.optim.Optimizer]:
    """The optimizers that were made since the first call of `on_optimizer_created` and are still alive."""
    return list(_optimizers)


def revisit_optimizers() -> None:
    """Call the functions again with every existing optimizer, whose parameters have been replaced."""
    for optimizer in existing_optimizers():
        _visit(optimizer)


def _make_init(original: Any) -> Any:
    def initialize(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _optimizers.add(self)
        _visit(self)

    return initialize


def _visit(optimizer: torch.optim.Optimizer) -> None:
    for callback in _callbacks:
        callback(optimizer)
