"""Answers a script's call of a sharded model."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moreh.errors import OptionError
from moreh.models.compatibility import has_call_hooks, uses_fp16_loss_scaling
from moreh.models.library_functions import LibraryFunctions
from moreh.models.structure import check_structure, structure_of
from moreh.runtime.batch.loss_output import output_class_of, with_lazy_outputs
from moreh.runtime.batch.missing_cache import missing_cache
from moreh.runtime.batch.model_inputs import ONE_WORKER, ModelInputs, check_same_on_all_ranks, read_inputs
from moreh.runtime.engine.calls.checks import (
    check_call,
    check_configuration,
    check_functions,
    check_surroundings,
    refusing_counts,
)
from moreh.runtime.engine.calls.history import CallHistories
from moreh.runtime.engine.calls.recorded import kept
from moreh.runtime.engine.model_runner import ModelRunner
from moreh.runtime.engine.parallel_model import ParallelModel
from moreh.runtime.engine.sharded.late_logits import LateLogits
from moreh.runtime.engine.sharded.registry import is_submodule_of_sharded, runner_of, whole_model
from moreh.trace import span

# Keys in the `__dict__` of a sharded model: its structure, and the library functions that it computes with.
_STRUCTURE = "_moreh_structure"
_FUNCTIONS = "_moreh_functions"
_histories = CallHistories()


def remember_computation(root: nn.Module) -> None:
    """Remember what a model consists of and which functions it calls; `call_sharded` refuses later changes."""
    root.__dict__.update({_STRUCTURE: structure_of(root), _FUNCTIONS: LibraryFunctions(root)})


def call_sharded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The outputs of a sharded model for a batch; NotImplemented for a module that is not sharded.

    Raises:
        OptionError: the module is a part of a sharded model, or the script has changed what the model consists of, or
            modules of the script's own have counted the call.
    """
    module = whole_model(module)
    runner = runner_of(module)
    if runner is not None:
        check_structure(module, module.__dict__[_STRUCTURE])
        module.__dict__[_FUNCTIONS] = check_functions(module, module.__dict__[_FUNCTIONS])
        check_configuration(runner.model, was_causal=runner.is_causal)
        with refusing_counts(module, runner.model.mesh):
            return _answer(runner, args, kwargs)
    if is_submodule_of_sharded(module):
        raise OptionError(
            f"a {type(module).__name__} inside a model that is sharded over workers was called by itself: "
            "call the whole model"
        )
    return NotImplemented


def _answer(runner: ModelRunner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The outputs of a sharded model for the whole batch, which every rank is called with; collective.

    Raises:
        IndexError: an id or a label is not in the vocabulary.
        OptionError: the call asks for what a sharded model cannot give.
        WorkerError: the ranks were called with different batches.
    """
    model = runner.model
    as_tuple, output_class = kwargs.get("return_dict") is False, output_class_of(model.parts.causal)
    inputs = _checked_inputs(model, args, kwargs)
    cache = missing_cache(model.parts.causal, output_class, inputs)
    if inputs.labels is None:
        logits = runner.logits(inputs)
        return (logits, *cache.values()) if as_tuple else output_class(logits=logits, **cache)
    history = _histories.of(model.parts.root)
    history.add_call()
    if as_tuple or history.needs_own_forward:
        loss, logits = runner.loss_and_logits(inputs)
        return (loss, logits, *cache.values()) if as_tuple else output_class(loss=loss, logits=logits, **cache)
    loss = runner.loss(inputs)
    return with_lazy_outputs(output_class, loss, LateLogits(runner, inputs, history, cache).compute)


def _checked_inputs(model: ParallelModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelInputs:
    """The inputs of a call, after all checks; collective. Raises as `_answer`."""
    causal: Any = model.parts.causal
    if has_call_hooks(model.parts.root):
        raise OptionError(f"a forward hook on the whole model would see no worker's call of it: {ONE_WORKER}")
    if model.plan.devices > 1:
        check_surroundings()
    with span("check_inputs"):
        inputs = read_inputs(causal, args, kwargs)
        if model.plan.devices > 1:
            check_same_on_all_ranks(inputs, model.mesh.device)
            check_call(causal, inputs)
    if torch.is_grad_enabled() and uses_fp16_loss_scaling(model.mesh.device):
        raise OptionError(
            "training in float16: gradients are computed in the call, before the script scales the loss, and most "
            f"would vanish; use bfloat16, or {ONE_WORKER}"
        )
    return replace(inputs, tensors={name: kept(tensor) for name, tensor in inputs.tensors.items()})
