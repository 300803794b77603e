"""What the hook does with a training batch where there is one worker: the same as each of several does with its rows.

A model that it does not know how to cut is computed by its own forward pass, as without the hook.
"""

import weakref
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moreh.errors import OptionError, PlanError
from moreh.log import logger
from moreh.planner.describe_module import unwrapped
from moreh.planner.plan import Plan
from moreh.runtime.decoder import take_apart
from moreh.runtime.known_computation import unknown_computation
from moreh.runtime.loss_output import LossFirst
from moreh.runtime.savings import Savings
from moreh.runtime.worker_model import WorkerModel

# Outputs that only the whole forward pass gives.
_WHOLE_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")
_WHOLE_INPUTS = ("past_key_values", "logits_to_keep", "inputs_embeds")


class OneWorker:
    """The models that this process has computed in micro-batches, and those that it computes as they are."""

    def __init__(self, savings: Savings) -> None:
        self._savings = savings
        self._known: weakref.WeakKeyDictionary[nn.Module, tuple[list[int], WorkerModel | None]] = weakref.WeakKeyDictionary()

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: int) -> Any:
        """What a call with labels gives; NotImplemented for one that the model's own forward pass is to compute.

        A micro-batch has at most so many tokens, or one row.
        """
        if kwargs.get("labels") is None or not _asks_for_the_loss(kwargs):
            return NotImplemented
        worker_model = self._worker_model(module)
        if worker_model is None or _has_gradient_hooks(module):
            return NotImplemented
        training = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())
        if torch.is_grad_enabled() and not training:
            return NotImplemented
        worker_model.tokens = tokens
        loss = worker_model.loss(args, kwargs)
        versions = _versions(module)

        def others() -> Any:
            if _versions(module) != versions:
                raise OptionError(
                    "the outputs beside the loss are computed when they are asked for, and the weights have changed since the "
                    "call: read them before the optimizer's step"
                )
            with torch.no_grad():
                whole: Any = module(*args, **{**kwargs, "labels": None})
            if training:
                whole.logits = _NoGradient.apply(torch.zeros((), requires_grad=True), whole.logits)  # type: ignore[no-untyped-call]
            return whole

        return LossFirst(loss=loss).compute_others_with(others)

    def _worker_model(self, module: nn.Module) -> WorkerModel | None:
        """The model cut into its parts, again if its modules have changed; None if it is computed as it is."""
        parts = [id(part) for part in module.modules()] + [id(parameter) for parameter in module.parameters()]
        known = self._known.get(module)
        if known is None or known[0] != parts:
            known = parts, _cut_model(module, self._savings)
            self._known[module] = known
        return known[1]


def _cut_model(module: nn.Module, savings: Savings) -> WorkerModel | None:
    causal = unwrapped(module)
    if not isinstance(causal, PreTrainedModel) or causal.get_output_embeddings() is None:
        return None
    problem = unknown_computation(module)
    if problem is None:
        try:
            layers = len(take_apart(module).layers)
        except PlanError as error:
            problem = str(error)
    if problem is not None:
        logger.info("Each batch of this model is computed in one piece: %s.", problem)
        return None
    return WorkerModel(module, Plan((layers,)), savings)


def _asks_for_the_loss(kwargs: dict[str, Any]) -> bool:
    """Whether the call asks for nothing that only the whole forward pass gives."""
    if kwargs.get("return_dict") is False or any(kwargs.get(name) for name in _WHOLE_OUTPUTS):
        return False
    return all(kwargs.get(name) is None for name in _WHOLE_INPUTS)


def _has_gradient_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see the gradients of the whole batch on their way."""
    return any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in module.parameters())


def _versions(module: nn.Module) -> list[int]:
    return [parameter._version for parameter in module.parameters()]


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
