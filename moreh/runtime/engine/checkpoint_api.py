"""Checkpoints of a training run, whether its model is sharded or not: `training_state` saves and loads them."""

import os
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from moreh.errors import OptionError
from moreh.runtime.checkpoint.dcp_io import save_state_async
from moreh.runtime.checkpoint.training_state import (
    collect_training_state,
    load_extra,
    load_training_state,
    unsharded_specs,
)
from moreh.runtime.engine.registry import runner_of
from moreh.runtime.launch.world import current_world
from moreh.trace import span

# A key in the `__dict__` of a model that is not sharded yet: the checkpoint to read when it is sharded.
_PENDING = "_moreh_pending_checkpoint"


def save_training(
    model: nn.Module, optimizers: Sequence[Optimizer], directory: str | os.PathLike[str], extra: Any
) -> Future[None]:
    """Write weights, optimizer states and `extra` while training goes on; collective.

    The directory gets its name once it is complete. `result()` of the future raises the error of a failed write.

    Raises:
        OptionError: several workers have not sharded the model yet, so there is no training state to save.
        CheckpointError: an optimizer has state that cannot be sharded as its parameter is.
        TypeError: `extra` has something else in it than numbers, strings, tensors, and lists, tuples and dicts of them.
    """
    with span("save_training"):  # the part that the training waits for; the files are written in the background
        runner = runner_of(model)
        if runner is not None:
            parallel = runner.model
            state = collect_training_state(
                parallel.specs, parallel.local_tensors(), optimizers, parallel.user_params, parallel.mesh, extra
            )
            return save_state_async(state, directory, parallel.mesh)
        if current_world().size > 1:
            raise OptionError(
                "a checkpoint before the first step: the model is not sharded over the workers yet; train first"
            )
        specs, parameters = unsharded_specs(model), dict(model.named_parameters())
        state = collect_training_state(specs, _detached(parameters), optimizers, parameters, None, extra)
        return save_state_async(state, directory, None)


def load_training(model: nn.Module, optimizers: Sequence[Optimizer], directory: str | os.PathLike[str]) -> Any:
    """Read what `save_training` wrote, under any plan and number of workers, and return `extra`; collective.

    If several workers have not sharded the model yet, the weights and optimizer states are read when they do. Each
    worker then reads its own shards.

    Raises:
        CheckpointError: there is no complete checkpoint, or the checkpoint is of another model or optimizer.
    """
    with span("load_training"):
        runner = runner_of(model)
        if runner is not None:
            parallel = runner.model
            return load_training_state(
                directory, parallel.specs, parallel.local_tensors(), optimizers, parallel.user_params, parallel.mesh
            )
        if current_world().size > 1:
            model.__dict__[_PENDING] = (os.fspath(directory), tuple(optimizers))
            return load_extra(directory)
        specs, parameters = unsharded_specs(model), dict(model.named_parameters())
        return load_training_state(directory, specs, _detached(parameters), optimizers, parameters, None)


def load_pending(model: nn.Module) -> None:
    """Load the checkpoint that `load_training` deferred, if any, into a model that was just sharded; collective."""
    pending = model.__dict__.pop(_PENDING, None)
    if pending is not None:
        directory, optimizers = pending
        load_training(model, optimizers, directory)


def is_waiting_for_state(model: nn.Module) -> bool:
    """Whether `load_training` has deferred a model's checkpoint until the model is sharded."""
    return _PENDING in model.__dict__


def _detached(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in parameters.items()}
