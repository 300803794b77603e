"""Computes a batch on one worker as each of several workers computes its rows: in micro-batches, without padding.

`SingleWorkerHook` asks it about every call with labels. As without the hook, the model's own forward pass computes a
call whose loss might come out different here, and a model that cannot be split into parts.
"""

import weakref
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moreh.errors import OptionError, PlanError
from moreh.log import logger
from moreh.models.compatibility import (
    has_call_hooks,
    has_gradient_hooks,
    unsupported_module,
    unsupported_reason,
    uses_fp16_loss_scaling,
    uses_neftune,
)
from moreh.models.introspection import unwrapped
from moreh.models.parts import split_into_parts
from moreh.options import ParallelOptions
from moreh.planner.plan.plan import Plan
from moreh.runtime.batch.loss_output import output_class_of, with_lazy_outputs
from moreh.runtime.batch.model_inputs import WHOLE_MODEL_OUTPUTS, ModelInputs, read_inputs
from moreh.runtime.engine.calls.history import CallHistories, CallHistory
from moreh.runtime.engine.calls.pending_loss import Gradients, PendingLoss, pending_loss
from moreh.runtime.engine.calls.recorded import RecordedCall
from moreh.runtime.engine.model_runner import ModelRunner
from moreh.trace import span

# Arguments that only the model's own forward pass takes.
_WHOLE_INPUTS = ("past_key_values", "logits_to_keep", "inputs_embeds")
# A runner keeps its model in memory, so only the most recent runners are kept.
_MAX_RUNNERS = 4


class FastPath:
    """The runners of the most recent models; None for a model that its own forward pass computes."""

    def __init__(self, options: ParallelOptions) -> None:
        self._options = options
        # With each runner, the ids of the modules and parameters that its model had.
        self._runners: dict[nn.Module, tuple[list[int], ModelRunner | None]] = {}
        self._histories = CallHistories()
        self._last_calls: weakref.WeakKeyDictionary[nn.Module, weakref.ref[RecordedCall]] = weakref.WeakKeyDictionary()

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], max_tokens: int) -> Any:
        """What a call with labels returns; NotImplemented for one that the model's own forward pass is to compute.

        A micro-batch has at most `max_tokens` tokens, or one row.
        """
        if kwargs.get("labels") is None or not _asks_for_the_loss(kwargs):
            return NotImplemented
        runner = self._runner_for(module)
        if runner is None or _does_more_than_the_loss(module):
            return NotImplemented
        history = self._histories.of(module)
        if history.needs_own_forward:
            return NotImplemented
        parameters = runner.model.compute_params
        trainable = [name for name, parameter in parameters.items() if parameter.requires_grad]
        if torch.is_grad_enabled() and not trainable:
            return NotImplemented
        try:
            with span("check_inputs"):
                inputs = read_inputs(runner.model.parts.causal, args, kwargs)
        except OptionError:
            return NotImplemented
        runner.max_tokens = max_tokens
        if (last_call := self._last_calls.pop(module, None)) is not None and (recorded := last_call()) is not None:
            recorded.drop_kept_weights()
        call = RecordedCall(module, parameters, args, kwargs)
        self._last_calls[module] = weakref.ref(call)
        tensors = call.tensors
        loss = self._loss(runner, inputs, call, history, trainable)

        def compute_other_outputs() -> Any:
            history.add_read(late=call.has_changed)
            return call.outputs_beside_the_loss(tensors)

        call.keep_weights_at_steps()
        return with_lazy_outputs(output_class_of(runner.model.parts.causal), loss, compute_other_outputs)

    @staticmethod
    def _loss(
        runner: ModelRunner, inputs: ModelInputs, call: RecordedCall, history: CallHistory, trainable: list[str]
    ) -> torch.Tensor:
        """The loss of a call; with gradients switched on, a function of the parameters with the names `trainable`."""
        expects_backward, use = history.expects_backward, history.add_call()
        if not torch.is_grad_enabled():
            return runner.loss_and_grads(inputs, with_grads=False)[0]
        loss, grads = runner.loss_and_grads(inputs, with_grads=expects_backward)
        max_tokens = runner.max_tokens

        def compute(tensors: tuple[torch.Tensor, ...]) -> Gradients:
            args, kwargs = call.arguments(tensors)
            with call.restored():
                runner.max_tokens = max_tokens
                again = read_inputs(runner.model.parts.causal, args, kwargs)
                computed = runner.loss_and_grads(again, with_grads=True)[1]
            return [computed.get(name) for name in trainable]

        gradients = [grads.get(name) for name in trainable] if expects_backward else None
        parameters = [runner.model.compute_params[name] for name in trainable]
        return pending_loss(loss, PendingLoss(call, gradients, compute, history, use), parameters)

    def _runner_for(self, module: nn.Module) -> ModelRunner | None:
        """The model's runner, a new one if its modules have changed; None for a model without a fast path."""
        ids = [id(submodule) for submodule in module.modules()] + [id(parameter) for parameter in module.parameters()]
        known = self._runners.pop(module, None)
        if known is None or known[0] != ids:
            known = ids, _make_runner(module, self._options)
        self._runners[module] = known
        if len(self._runners) > _MAX_RUNNERS:
            del self._runners[next(iter(self._runners))]
        return known[1]


def _make_runner(module: nn.Module, options: ParallelOptions) -> ModelRunner | None:
    causal = unwrapped(module)
    if not isinstance(causal, PreTrainedModel) or causal.get_output_embeddings() is None:
        return None
    reason = unsupported_reason(module) or unsupported_module(module)
    if reason is None:
        try:
            num_layers = len(split_into_parts(module).layers)
        except PlanError as error:
            reason = str(error)
    if reason is not None:
        logger.info("Each batch of this model is computed in one piece: %s.", reason)
        return None
    return ModelRunner(module, Plan((num_layers,)), options)


def _asks_for_the_loss(kwargs: dict[str, Any]) -> bool:
    """Whether the call asks for the loss only, and for no argument or output of the model's own forward pass."""
    if kwargs.get("return_dict") is False or any(kwargs.get(name) for name in WHOLE_MODEL_OUTPUTS):
        return False
    return all(kwargs.get(name) is None for name in _WHOLE_INPUTS)


def _does_more_than_the_loss(module: nn.Module) -> bool:
    """Whether a call has effects that computing its loss from micro-batches would not have.

    Only what a script may change at any time is checked here. The rest was checked when the runner was made.
    """
    if (
        unsupported_reason(module) is not None
        or has_call_hooks(module)
        or has_gradient_hooks(module)
        or uses_neftune(module)
    ):
        return True
    parameters = list(module.parameters())
    # torch.func.functional_call puts computed tensors in the place of parameters.
    return uses_fp16_loss_scaling(parameters[0].device) or not all(
        parameter.is_leaf and parameter.dtype != torch.float16 for parameter in parameters
    )
