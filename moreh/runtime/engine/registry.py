"""The models of a script that are divided over the workers: they are called, clipped and optimized as if they were whole."""

import weakref
from typing import Any

import torch
from torch import nn

from moreh.errors import OptionError
from moreh.options import DEFAULT_OPTIONS, ParallelOptions
from moreh.patches.module_call import instead_of_model_calls
from moreh.planner.plan.plan import Plan
from moreh.runtime.engine.gradients import global_grad_norm
from moreh.runtime.engine.model_methods import replace_methods
from moreh.runtime.engine.model_runner import ModelRunner
from moreh.runtime.engine.optimizer_patches import (
    forbid_pickling_state,
    on_optimizer_created,
    patch_total_norm,
    replace_params,
    revisit_optimizers,
)
from moreh.runtime.engine.parallel_model import local_tensor

_KEY = "_moreh_worker_model"
_PART = "_moreh_part_of_divided_model"
_divided: weakref.WeakSet[ModelRunner] = weakref.WeakSet()
_ready = False


def install_sharding_support() -> None:
    """Install what divided models need; before the script makes its model and optimizer. A second call does nothing."""
    global _ready
    if not _ready:
        _ready = True
        on_optimizer_created(_check_supported)
        patch_total_norm(_norm_of)
        instead_of_model_calls(call_sharded)


def shard_model(root: nn.Module, plan: Plan, options: ParallelOptions = DEFAULT_OPTIONS) -> ModelRunner:
    """Divide a model over all workers as the plan says, and its optimizers with it; collective."""
    originals = dict(root.named_parameters())
    model_runner = ModelRunner(root, plan, options)
    now = dict(root.named_parameters())
    replace_params({id(p): now[name] for name, p in originals.items()}, list(originals.values()))
    revisit_optimizers()
    _divided.add(model_runner)
    replace_methods(model_runner.model)
    root.__dict__[_KEY] = model_runner
    for module in root.modules():
        module.__dict__[_PART] = True
    return model_runner


def _check_supported(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer of a divided model that would be wrong on its parts, of torch's those that see more than elements.

    Adafactor's means of rows and columns are not implemented for distributed tensors; L-BFGS takes products of all parameters
    together, of which a stage has its own only. The state of others must not be saved as if it were whole.

    Raises:
        OptionError: says so.
    """
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    models = [w.model for w in _divided if any(id(parameter) in own for parameter in w.model.user_params.values())]
    if not models:
        return
    forbid_pickling_state(optimizer)
    divided = any(model.plan.tensor > 1 or model.sharded for model in models)
    if isinstance(optimizer, torch.optim.LBFGS) and (divided or any(model.plan.pipeline > 1 for model in models)):
        raise OptionError("LBFGS looks at all parameters together, which are divided over workers: use AdamW or SGD")
    if isinstance(optimizer, torch.optim.Adafactor) and divided:
        raise OptionError(
            "Adafactor looks at rows and columns of matrices, which are divided over workers: use AdamW or SGD"
        )


def runner_of(root: nn.Module) -> ModelRunner | None:
    """What `shard_model` made of a model; None if it is whole."""
    return root.__dict__.get(_KEY)


def is_submodule_of_sharded(module: nn.Module) -> bool:
    """Whether a module is inside of a divided model, and not the model itself."""
    return _PART in module.__dict__ and _KEY not in module.__dict__


def call_sharded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a divided model returns for a batch; NotImplemented for a module that is not divided.

    Raises:
        OptionError: the module is a part of a divided model.
    """
    model_runner = runner_of(module)
    if model_runner is not None:
        return model_runner.call(args, kwargs)
    if is_submodule_of_sharded(module):
        raise OptionError(
            f"a {type(module).__name__} inside of a model that is divided over workers was called by itself: "
            "call the whole model"
        )
    return NotImplemented


def _norm_of(tensors: list[torch.Tensor], norm_type: float) -> torch.Tensor | None:
    """The norm over all workers of gradients of one divided model; None if these are no such gradients.

    A worker that has none of them, because they are parameters of other stages, takes part with an empty list.
    """
    for model_runner in _divided:
        by_id = {id(p.grad): name for name, p in model_runner.model.user_params.items() if p.grad is not None}
        names = [by_id.get(id(tensor)) for tensor in tensors]
        if all(name is not None for name in names):
            gradients = {name: local_tensor(t) for name, t in zip(names, tensors, strict=True) if name is not None}
            return global_grad_norm(model_runner.model, gradients, norm_type)
    return None
