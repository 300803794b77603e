"""The fast path of one worker: computes a batch in micro-batches, without padding.

`SingleWorkerHook` passes it every call with labels. The model's own forward pass computes all calls and models that the
fast path does not support.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moreh.errors import OptionError, PlanError
from moreh.log import logger
from moreh.models.compatibility import uses_fp16_loss_scaling, uses_neftune
from moreh.models.introspection import unwrapped
from moreh.models.known_computation import KnownComputation
from moreh.models.observers import observer_of_operations
from moreh.models.parts import split_into_parts
from moreh.options import ParallelOptions
from moreh.planner.plan.plan import Plan
from moreh.runtime.batch.host_copies import on_host
from moreh.runtime.batch.loss_output import output_class_of, with_lazy_outputs
from moreh.runtime.batch.micro_batches import is_causal_model
from moreh.runtime.batch.model_inputs import CACHE_ARGUMENTS, WHOLE_MODEL_OUTPUTS, ModelInputs, read_inputs
from moreh.runtime.engine.calls.checks import has_wrong_ids
from moreh.runtime.engine.calls.history import CallHistories, CallHistory
from moreh.runtime.engine.calls.pending_loss import Gradients, PendingLoss, pending_loss
from moreh.runtime.engine.calls.recorded import RecordedCall
from moreh.runtime.engine.calls.unread import keep_weights_at_steps
from moreh.runtime.engine.model_runner import ModelRunner
from moreh.threads import CALL_THREADS
from moreh.trace import span

# Arguments that only the model's own forward pass takes.
_WHOLE_INPUTS = (*CACHE_ARGUMENTS, "logits_to_keep", "inputs_embeds")
# A runner keeps its model in memory, so only the most recent runners are kept.
_MAX_RUNNERS = 4


class FastPath:
    """Computes calls with labels, and keeps a `ModelRunner` for each of the most recent models."""

    def __init__(self, options: ParallelOptions) -> None:
        self._options = options
        self._runners: dict[nn.Module, _KnownModel] = {}
        self._histories = CallHistories()
        self._last_calls: weakref.WeakKeyDictionary[nn.Module, weakref.ref[RecordedCall]] = weakref.WeakKeyDictionary()

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], max_tokens: int) -> Any:
        """The outputs of a call with labels; NotImplemented if the model's own forward pass must compute it.

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
                inputs = read_inputs(runner.model.parts.causal, *on_host(args, kwargs))
        except OptionError:
            return NotImplemented
        if has_wrong_ids(runner.model.parts.causal, inputs):
            return NotImplemented  # it raises torch's error
        runner.max_tokens = max_tokens
        if (last_call := self._last_calls.pop(module, None)) is not None and (recorded := last_call()) is not None:
            recorded.drop_kept_weights()
        call = RecordedCall(module, parameters, args, kwargs, self._runners[module].computes_as_now())
        self._last_calls[module] = weakref.ref(call)
        tensors = call.tensors
        loss = self._loss(runner, inputs, call, history, trainable)

        def compute_other_outputs() -> Any:
            history.add_read(late=call.has_changed)
            return call.outputs_beside_the_loss(tensors)

        keep_weights_at_steps(call)
        return with_lazy_outputs(output_class_of(runner.model.parts.causal), loss, compute_other_outputs)

    @staticmethod
    def _loss(
        runner: ModelRunner, inputs: ModelInputs, call: RecordedCall, history: CallHistory, trainable: list[str]
    ) -> torch.Tensor:
        """The loss of a call; with gradients enabled, a function of the parameters named in `trainable`."""
        expects_backward, use = history.expects_backward, history.add_call()
        if not torch.is_grad_enabled():
            return runner.loss_and_grads(inputs, with_grads=False)[0]
        loss, grads = runner.loss_and_grads(inputs, with_grads=expects_backward)
        max_tokens = runner.max_tokens
        parameters = [runner.model.compute_params[name] for name in trainable]

        def compute(tensors: tuple[torch.Tensor, ...]) -> Gradients:
            args, kwargs = call.arguments(tensors)
            with CALL_THREADS.alone(call.thread) as is_alone, call.restored():
                if not is_alone:
                    return call.own_gradients(tensors, parameters)
                runner.max_tokens = max_tokens
                again = read_inputs(runner.model.parts.causal, *on_host(args, kwargs))
                computed = runner.loss_and_grads(again, with_grads=True)[1]
            return [computed.get(name) for name in trainable]

        gradients = [grads.get(name) for name in trainable] if expects_backward else None
        return pending_loss(loss, PendingLoss(call, gradients, compute, history, use), parameters)

    def _runner_for(self, module: nn.Module) -> ModelRunner | None:
        """The model's runner, a new one if its modules have changed; None if the model is not supported."""
        known = self._runners.pop(module, None) or _KnownModel(module)
        self._runners[module] = known
        if len(self._runners) > _MAX_RUNNERS:
            del self._runners[next(iter(self._runners))]
        return known.runner_for_call(self._options)


class _KnownModel:
    """A model with its runner, which is replaced when the model changes."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        causal = unwrapped(module)
        self._is_language_model = isinstance(causal, PreTrainedModel) and causal.get_output_embeddings() is not None
        self._computation = KnownComputation(module)
        self._runner: ModelRunner | None = None
        # The version of the model that the runner was created for.
        self._version = -1
        # Those of the computation that the runner's batches are cut for.
        self._changes = 0
        self._logged: set[str] = set()

    def computes_as_now(self) -> Callable[[], bool]:
        """A function that says later whether the model's computation is known and has the same modules as now."""
        computation, version = self._computation, self._computation.version
        return lambda: computation.unknown_reason() is None and computation.version == version

    def runner_for_call(self, options: ParallelOptions) -> ModelRunner | None:
        """The runner if the runtime supports the model in its current state, else None."""
        if not self._is_language_model:
            return None
        reason = self._computation.unknown_reason()
        if self._changes != self._computation.changes:
            self._changes = self._computation.changes
            if self._runner is not None and self._runner.is_causal != is_causal_model(unwrapped(self._module)):
                self._computation.version += 1
        if reason is None and self._version != self._computation.version:
            # Dropped first: a runner that cannot be made leaves none behind.
            self._runner, self._version = None, self._computation.version
            try:
                self._runner = ModelRunner(self._module, Plan((len(split_into_parts(self._module).layers),)), options)
            except PlanError as error:
                reason = str(error)
        if reason is None:
            return self._runner
        if reason not in self._logged:
            self._logged.add(reason)
            logger.info("Each batch of this model is computed in one piece: %s.", reason)
        return None


def _asks_for_the_loss(kwargs: dict[str, Any]) -> bool:
    """True if the call needs only the loss, without arguments or outputs that only the model's own forward supports."""
    if kwargs.get("return_dict") is False or any(kwargs.get(name) for name in WHOLE_MODEL_OUTPUTS):
        return False
    return all(kwargs.get(name) is None for name in _WHOLE_INPUTS)


def _does_more_than_the_loss(module: nn.Module) -> bool:
    """True if a call has effects that a computation in micro-batches would not reproduce."""
    device = next(module.parameters()).device
    return observer_of_operations() is not None or uses_neftune(module) or uses_fp16_loss_scaling(device)
