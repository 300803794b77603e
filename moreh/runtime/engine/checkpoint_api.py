"""Checkpoints of a script's training, whether its model is whole or divided: what `training_state` saves and loads."""

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

# On a whole model in a world of several workers: where its state is to be read from once it is divided.
PENDING = "_moreh_state_to_load"


def save_training(
    model: nn.Module, optimizers: Sequence[Optimizer], directory: str | os.PathLike[str], extra: Any
) -> Future[None]:
    """Write weights, optimizer states and `extra` while training goes on; for all workers to call.

    The directory has its name once everything is in it. The future's result raises what went wrong.

    Raises:
        OptionError: several workers have not divided the model yet, so that there is no training to save.
    """
    model_runner = runner_of(model)
    if model_runner is not None:
        parallel = model_runner.model
        state = collect_training_state(
            parallel.layouts, parallel.local_tensors(), optimizers, parallel.user_params, parallel.mesh, extra
        )
        return save_state_async(state, directory, parallel.mesh)
    if current_world().size > 1:
        raise OptionError(
            "a checkpoint before the first step: the model is not divided over the workers yet; train first"
        )
    layouts = unsharded_specs(model)
    parameters = dict(model.named_parameters())
    tensors: dict[str, torch.Tensor] = {name: parameter.detach() for name, parameter in parameters.items()}
    return save_state_async(
        collect_training_state(layouts, tensors, optimizers, parameters, None, extra), directory, None
    )


def load_training(model: nn.Module, optimizers: Sequence[Optimizer], directory: str | os.PathLike[str]) -> Any:
    """Read what `save_training` wrote, on whatever plan and number of workers, and return `extra`; for all workers to call.

    On several workers that have not divided the model yet, weights and optimizer states are read when they do, each
    worker its own parts.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is of another model or optimizer.
    """
    model_runner = runner_of(model)
    if model_runner is not None:
        parallel = model_runner.model
        return load_training_state(
            directory, parallel.layouts, parallel.local_tensors(), optimizers, parallel.user_params, parallel.mesh
        )
    if current_world().size > 1:
        model.__dict__[PENDING] = (os.fspath(directory), tuple(optimizers))
        return load_extra(directory)
    parameters = dict(model.named_parameters())
    tensors: dict[str, torch.Tensor] = {name: parameter.detach() for name, parameter in parameters.items()}
    return load_training_state(directory, unsharded_specs(model), tensors, optimizers, parameters, None)


def load_pending(model: nn.Module) -> None:
    """Read into a model that was just divided what `load_training` has put off."""
    pending = model.__dict__.pop(PENDING, None)
    if pending is not None:
        directory, optimizers = pending
        load_training(model, optimizers, directory)


def is_waiting_for_state(model: nn.Module) -> bool:
    """Whether a whole model does not have the weights yet with which its training is to go on."""
    return PENDING in model.__dict__
