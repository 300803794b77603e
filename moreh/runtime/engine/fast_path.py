"""Computes a batch on one worker as each of several workers computes its rows: in micro-batches, without padding.

`SingleWorkerHook` asks it about every call with labels. Calls that it does not know to be equal, and models that it
does not know how to split, are left to the model's own forward pass, as without the hook.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext
from transformers import PreTrainedModel

from moreh.errors import OptionError, PlanError
from moreh.log import logger
from moreh.models.compatibility import uses_fp16_loss_scaling, uses_neftune
from moreh.models.introspection import unwrapped
from moreh.models.known_computation import KnownComputation
from moreh.models.parts import split_into_parts
from moreh.options import ParallelOptions
from moreh.planner.plan.plan import Plan
from moreh.runtime.batch.loss_output import LazyLogitsOutput
from moreh.runtime.batch.model_inputs import WHOLE_MODEL_OUTPUTS, read_inputs
from moreh.runtime.engine.model_runner import ModelRunner
from moreh.trace import span

# Arguments that only the model's own forward pass takes.
_WHOLE_INPUTS = ("past_key_values", "logits_to_keep", "inputs_embeds")
# A runner keeps its model in memory, so only those of the last models are kept.
_MAX_RUNNERS = 4


class FastPath:
    """The runners of the last models that this process has computed; None for a model that is computed as it is."""

    def __init__(self, options: ParallelOptions) -> None:
        self._options = options
        self._runners: dict[nn.Module, _KnownModel] = {}

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], max_tokens: int) -> Any:
        """What a call with labels returns; NotImplemented for one that the model's own forward pass is to compute.

        A micro-batch has at most `max_tokens` tokens, or one row.
        """
        if kwargs.get("labels") is None or not _asks_for_the_loss(kwargs):
            return NotImplemented
        runner = self._runner_for(module)
        if runner is None or _does_more_than_the_loss(module):
            return NotImplemented
        training = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())
        if torch.is_grad_enabled() and not training:
            return NotImplemented
        try:
            with span("check_inputs"):
                inputs = read_inputs(runner.model.parts.causal, args, kwargs)
        except OptionError:
            return NotImplemented
        runner.max_tokens = max_tokens
        loss = runner.loss(inputs)
        versions = _versions(module, args, kwargs)

        def compute_other_outputs() -> Any:
            if _versions(module, args, kwargs) != versions:
                raise OptionError(
                    "outputs other than the loss are computed when they are asked for, and the weights or inputs have "
                    "changed since the call: read them before the optimizer's step"
                )
            with torch.no_grad():
                outputs: Any = module(*args, **{**kwargs, "labels": None})
            if training:
                outputs.logits = _NoGradient.apply(torch.zeros((), requires_grad=True), outputs.logits)  # type: ignore[no-untyped-call]
            return outputs

        return LazyLogitsOutput(loss=loss).with_lazy(compute_other_outputs)

    def _runner_for(self, module: nn.Module) -> ModelRunner | None:
        """The model's runner, a new one if its modules have changed; None if this call is computed as it is."""
        known = self._runners.pop(module, None) or _KnownModel(module)
        self._runners[module] = known
        if len(self._runners) > _MAX_RUNNERS:
            del self._runners[next(iter(self._runners))]
        return known.runner_for_call(self._options)


class _KnownModel:
    """A model and its runner."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        causal = unwrapped(module)
        self._is_language_model = isinstance(causal, PreTrainedModel) and causal.get_output_embeddings() is not None
        self._computation = KnownComputation(module)
        self._runner: ModelRunner | None = None
        # What the runner was made for.
        self._version = -1
        self._logged: set[str] = set()

    def runner_for_call(self, options: ParallelOptions) -> ModelRunner | None:
        """The runner, if the runtime knows what the model computes now; None if it does not."""
        if not self._is_language_model:
            return None
        reason = self._computation.unknown_reason()
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
    """Whether the call asks for nothing that only the model's own forward pass gives."""
    if kwargs.get("return_dict") is False or any(kwargs.get(name) for name in WHOLE_MODEL_OUTPUTS):
        return False
    return all(kwargs.get(name) is None for name in _WHOLE_INPUTS)


def _does_more_than_the_loss(module: nn.Module) -> bool:
    """Whether a call has effects that computing its loss from micro-batches would not have."""
    device = next(module.parameters()).device
    return _is_transformed() or uses_neftune(module) or uses_fp16_loss_scaling(device)


def _is_transformed() -> bool:
    """Whether the script lets torch see, transform or store each operation of a call."""
    autograd: Any = torch._C._autograd
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return True
    if torch._C._len_torch_dispatch_stack() > 0:
        return True
    modes = (torch._C._get_function_stack_at(index) for index in range(torch._C._len_torch_function_stack()))
    if any(not isinstance(mode, DeviceContext) for mode in modes):
        return True
    hooks = autograd._top_saved_tensors_default_hooks(True) if autograd._saved_tensors_hooks_is_enabled() else None
    # Hooks of this package count what a call keeps.
    return hooks is not None and not str(getattr(hooks[0], "__module__", "")).startswith("moreh.")


def _versions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Numbers that grow when a parameter or an input is changed in place."""
    inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    # Those made in torch.inference_mode count no changes.
    return [tensor._version for tensor in (*module.parameters(), *inputs) if not tensor.is_inference()]


class _NoGradient(torch.autograd.Function):
    """Outputs that were computed after the backward pass: a loss made of them would silently lack its gradient."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[None, None]:
        raise OptionError(
            "a gradient through the logits of a call with labels: its gradients were computed with the loss; "
            "call the model without labels for a loss of your own"
        )
