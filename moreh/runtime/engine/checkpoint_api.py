"""Checkpoints of a training run, whether its model is sharded or not: `training_state` saves and loads them."""

import os
import platform
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from moreh.errors import CheckpointError, OptionError
from moreh.runtime.checkpoint.dcp_io import save_state_async
from moreh.runtime.checkpoint.manifest import MANIFEST, find_damage, read_manifest
from moreh.runtime.checkpoint.training_state import (
    collect_training_state,
    load_extra,
    load_training_state,
    unsharded_specs,
)
from moreh.runtime.engine.sharded.registry import runner_of
from moreh.runtime.kernels.precision import choose_as, chosen_precisions
from moreh.runtime.launch.world import current_world
from moreh.trace import span
from moreh.version import __version__

# A key in the `__dict__` of a model that is not sharded yet: the checkpoint to read when it is sharded.
_PENDING = "_moreh_pending_checkpoint"


def save_training(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    directory: str | os.PathLike[str],
    extra: Any,
    about: Mapping[str, Any] | None = None,
    *,
    without: Collection[str] = (),
) -> Future[None]:
    """Write weights, optimizer states and `extra` in the background; collective.

    The directory gets its name once it is complete. `result()` of the future raises the error of a failed write.
    `about` is what the script says about the training, as JSON has it; `check_training` returns it before anything else
    is read. `without` names parameters that are left out, such as frozen ones, which the script has from elsewhere.

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
                parallel.specs,
                parallel.local_tensors(),
                optimizers,
                parallel.user_params,
                parallel.mesh,
                extra,
                without,
            )
            return save_state_async(state, directory, parallel.mesh, _about(optimizers, about))
        if current_world().size > 1:
            raise OptionError(
                "a checkpoint before the first step: the model is not sharded over the workers yet; train first"
            )
        specs, parameters = unsharded_specs(model), dict(model.named_parameters())
        state = collect_training_state(specs, _detached(parameters), optimizers, parameters, None, extra, without)
        return save_state_async(state, directory, None, _about(optimizers, about))


def _about(optimizers: Sequence[Optimizer], script: Mapping[str, Any] | None) -> dict[str, Any]:
    """The manifest's entries about a training."""
    return {
        "optimizers": [type(optimizer).__name__ for optimizer in optimizers],
        "bfloat16": chosen_precisions(),
        "workers": current_world().size,
        "versions": software_versions(),
        "script": dict(script or {}),
    }


def software_versions() -> dict[str, str]:
    """The versions of the software that a training depends on, as a checkpoint stores them."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "moreh": __version__,
    }


def check_training(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Check the files of a checkpoint, and return its manifest's entries about the training; collective.

    That is: "optimizers" (the names of their classes), "bfloat16" (whether it was computed in it, by the type of the
    device), "workers", "versions", and "script" (what `save_training` was given as `about`).

    Raises:
        CheckpointError: there is no complete checkpoint, or a file of it is damaged.
    """
    directory, world = Path(directory), current_world()
    problems: list[str | None] = [find_damage(directory, (world.rank, world.size))]
    if world.size > 1:
        problems *= world.size
        dist.all_gather_object(problems, problems[0])
    for problem in problems:
        if problem is not None:
            raise CheckpointError(problem)
    return dict(read_manifest(directory).about)


def load_training(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    directory: str | os.PathLike[str],
    *,
    keep: Collection[str] = (),
    without: Collection[str] = (),
    is_checked: bool = False,
) -> Any:
    """Load a checkpoint of `save_training`, under any plan and number of workers; returns `extra`; collective.

    If several workers have not sharded the model yet, the weights and optimizer states are read when they do. Each
    worker then reads its own shards. Training continues in the precision of the checkpoint.

    Args:
        model: the model.
        optimizers: the optimizers.
        directory: the checkpoint.
        keep: settings of the optimizers' groups, such as "lr", that stay as they are.
        without: the parameters that were left out of the checkpoint; they stay as they are.
        is_checked: `check_training` has just checked the files.

    Raises:
        CheckpointError: there is no complete checkpoint, a file of it is damaged, or it is of another model or
            optimizer.
    """
    with span("load_training"):
        directory = Path(directory)
        if not is_checked:
            check_training(directory)
        choose_as(_precisions_of(directory))
        runner = runner_of(model)
        if runner is not None:
            parallel = runner.model
            return load_training_state(
                directory,
                parallel.specs,
                parallel.local_tensors(),
                optimizers,
                parallel.user_params,
                parallel.mesh,
                keep,
                without,
            )
        if current_world().size > 1:
            model.__dict__[_PENDING] = (directory, tuple(optimizers), tuple(keep), frozenset(without))
            return load_extra(directory)
        specs, parameters = unsharded_specs(model), dict(model.named_parameters())
        return load_training_state(directory, specs, _detached(parameters), optimizers, parameters, None, keep, without)


def _precisions_of(directory: Path) -> dict[str, bool]:
    """True if a training was computed in bfloat16, by the type of the device.

    Raises:
        CheckpointError: the manifest has something else there, which this package has not written.
    """
    precisions = read_manifest(directory).about.get("bfloat16", {})
    if not (isinstance(precisions, dict) and all(isinstance(value, bool) for value in precisions.values())):
        raise CheckpointError(
            f"{directory / MANIFEST} is not what save_training writes: bfloat16 is {str(precisions)[:60]!r}. "
            "Give an earlier checkpoint."
        )
    return precisions


def load_pending(model: nn.Module) -> None:
    """Load the checkpoint that `load_training` deferred, if any, into a model that was just sharded; collective."""
    pending = model.__dict__.pop(_PENDING, None)
    if pending is not None:
        directory, optimizers, keep, without = pending
        load_training(model, optimizers, directory, keep=keep, without=without, is_checked=True)


def is_waiting_for_state(model: nn.Module) -> bool:
    """True if `load_training` has deferred a model's checkpoint until the model is sharded."""
    return _PENDING in model.__dict__


def _detached(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in parameters.items()}
