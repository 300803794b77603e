"""What the hook does with a training batch where there is one worker: the same as each of several does with its rows.

A model that it does not know how to cut is computed by its own forward pass, as without the hook.
"""

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
from moreh.runtime.batch.loss_output import LazyLogitsOutput
from moreh.runtime.batch.model_inputs import WHOLE_MODEL_OUTPUTS, read_inputs
from moreh.runtime.engine.model_runner import ModelRunner

# What only the whole forward pass can take.
_WHOLE_INPUTS = ("past_key_values", "logits_to_keep", "inputs_embeds")


# Models that are taken apart again once a script has called as many others: what is known of a model keeps it in memory.
_KNOWN_MODELS = 4


class FastPath:
    """The last models that this process has computed in micro-batches, and those that it computes as they are."""

    def __init__(self, options: ParallelOptions) -> None:
        self._options = options
        self._known: dict[nn.Module, tuple[list[int], ModelRunner | None]] = {}

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: int) -> Any:
        """What a call with labels gives; NotImplemented for one that the model's own forward pass is to compute.

        A micro-batch has at most so many tokens, or one row.
        """
        if kwargs.get("labels") is None or not _asks_for_the_loss(kwargs):
            return NotImplemented
        model_runner = self._runner_for(module)
        if model_runner is None or _is_more_than_a_loss(module):
            return NotImplemented
        training = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())
        if torch.is_grad_enabled() and not training:
            return NotImplemented
        try:
            inputs = read_inputs(model_runner.model.decoder.causal, args, kwargs)
        except OptionError:
            return NotImplemented
        model_runner.tokens = tokens
        loss = model_runner.loss(inputs)
        versions = _versions(module, args, kwargs)

        def others() -> Any:
            if _versions(module, args, kwargs) != versions:
                raise OptionError(
                    "the outputs beside the loss are computed when they are asked for, and the weights or inputs have changed "
                    "since the call: read them before the optimizer's step"
                )
            with torch.no_grad():
                whole: Any = module(*args, **{**kwargs, "labels": None})
            if training:
                whole.logits = _NoGradient.apply(torch.zeros((), requires_grad=True), whole.logits)  # type: ignore[no-untyped-call]
            return whole

        return LazyLogitsOutput(loss=loss).with_lazy(others)

    def _runner_for(self, module: nn.Module) -> ModelRunner | None:
        """The model cut into its parts, again if its modules have changed; None if it is computed as it is."""
        parts = [id(part) for part in module.modules()] + [id(parameter) for parameter in module.parameters()]
        known = self._known.pop(module, None)
        if known is None or known[0] != parts:
            known = parts, _make_runner(module, self._options)
        self._known[module] = known
        if len(self._known) > _KNOWN_MODELS:
            del self._known[next(iter(self._known))]
        return known[1]


def _make_runner(module: nn.Module, options: ParallelOptions) -> ModelRunner | None:
    causal = unwrapped(module)
    if not isinstance(causal, PreTrainedModel) or causal.get_output_embeddings() is None:
        return None
    problem = unsupported_reason(module) or unsupported_module(module)
    if problem is None:
        try:
            layers = len(split_into_parts(module).layers)
        except PlanError as error:
            problem = str(error)
    if problem is not None:
        logger.info("Each batch of this model is computed in one piece: %s.", problem)
        return None
    return ModelRunner(module, Plan((layers,)), options)


def _asks_for_the_loss(kwargs: dict[str, Any]) -> bool:
    """Whether the call asks for nothing that only the whole forward pass gives."""
    if kwargs.get("return_dict") is False or any(kwargs.get(name) for name in WHOLE_MODEL_OUTPUTS):
        return False
    return all(kwargs.get(name) is None for name in _WHOLE_INPUTS)


def _is_more_than_a_loss(module: nn.Module) -> bool:
    """Whether a call has effects that computing its loss in parts would not have.

    What a script may change at any time: the rest is looked at once, when the model is cut.
    """
    if (
        unsupported_reason(module) is not None
        or has_call_hooks(module)
        or has_gradient_hooks(module)
        or uses_neftune(module)
    ):
        return True
    parameters = list(module.parameters())
    # torch.func.functional_call puts results of computations in their places.
    return uses_fp16_loss_scaling(parameters[0].device) or not all(
        one.is_leaf and one.dtype != torch.float16 for one in parameters
    )


def _versions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    return [tensor._version for tensor in (*module.parameters(), *given)]


class _NoGradient(torch.autograd.Function):
    """Outputs that were computed after the backward pass: a loss made of them would lack its gradient in silence."""

    @staticmethod
    def forward(context: Any, leaf: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[None, None]:
        raise OptionError(
            "a gradient through the logits of a call with labels: its gradients were computed with the loss; "
            "call the model without labels for a loss of your own"
        )
