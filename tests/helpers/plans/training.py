"""A training as a script writes it, on a model that is sharded or whole, and what is kept of it for comparison."""

import copy
import functools
import itertools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional

from tests.helpers.float64 import exact_float64
from tests.helpers.plans.cases import CALLS, STEPS, batch, build_model, evaluation_batch

MAX_NORM = 0.5
# Adam divides each gradient by its own size. With the usual 1e-8, gradients that are mathematically 0, as those of
# the keys' biases are, would become weights made of rounding.
EPSILON = 1e-6
# The evaluation comes before the weights of this step change, and not in the last step: neither pending gradients nor
# weights that an evaluation has gathered may reach the next step in another state.
EVALUATED_STEP = 0


@dataclass
class Curves:
    """The curves that a script sees of its training."""

    losses: list[float] = field(default_factory=list)
    """Of each step."""
    norms: list[float] = field(default_factory=list)
    """Of each step's gradients, before they are clipped."""
    evaluation: float = float("nan")
    """The loss of the evaluation."""
    logits: np.ndarray | None = None
    """Of the evaluation, `[row, token, vocabulary]`; 0 where there is padding."""


@dataclass(frozen=True)
class Training:
    """A finished training."""

    curves: Curves
    gradients: dict[str, torch.Tensor | None]
    """Those of the first step before they were clipped, by parameter."""
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer


def built_in_loss(model, inputs):
    """The loss that the model computes."""
    return model(**inputs, use_cache=False).loss


def custom_loss(model, inputs):
    """A loss that the script makes of the logits: tokens count by their place, with a z-loss."""
    labels = inputs["labels"][:, 1:]
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    logits = logits[:, :-1][labels != -100]
    token_losses = functional.cross_entropy(logits, labels[labels != -100], reduction="none")
    weights = 1 + torch.arange(labels.shape[1]).expand_as(labels)[labels != -100] % 3
    return (weights * token_losses + 1e-3 * logits.logsumexp(-1) ** 2).mean()


LOSSES = {"built-in": built_in_loss, "custom": custom_loss}


def train(model, prepare=lambda model: None, steps=STEPS, loss_of=built_in_loss):
    """Train a model. `prepare` is called with it when the optimizer has been made."""
    batch_indices = itertools.count()
    curves = Curves()
    gradients = {}
    with exact_float64():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPSILON, weight_decay=0.1)
        prepare(model)
        for step in range(steps):
            total = 0.0
            for _ in range(CALLS[step]):
                loss = loss_of(model, batch(next(batch_indices)))
                (loss / CALLS[step]).backward()
                total += loss.item() / CALLS[step]
            if step == 0:
                gradients = {name: _copy(parameter.grad) for name, parameter in model.named_parameters()}
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            if step == EVALUATED_STEP:
                _evaluate(model, curves)
            optimizer.step()
            model.zero_grad()
            curves.losses.append(total)
            curves.norms.append(float(norm))
    return Training(curves, gradients, model, optimizer)


def _evaluate(model, curves):
    inputs = evaluation_batch()
    model.eval()
    with torch.no_grad():
        curves.evaluation = float(model(**inputs).loss)
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    curves.logits = logits.masked_fill(inputs["attention_mask"][..., None] == 0, 0).numpy()
    model.train()


def _copy(gradient):
    return None if gradient is None else gradient.detach().clone()


@functools.cache
def base_model(family):
    return build_model(family)


def new_model(family):
    """The model that every training of the family starts from."""
    return copy.deepcopy(base_model(family))


@dataclass(frozen=True)
class Reference:
    """The curves of a single process."""

    curves: Curves
    gradients: dict[str, np.ndarray]
    """Of the first step, by parameter."""
    weights: dict[str, np.ndarray]
    """In the end, by parameter."""


@functools.cache
def reference(family, steps=STEPS, loss="built-in"):
    """The plain loop of transformers in this process."""
    training = train(new_model(family), steps=steps, loss_of=LOSSES[loss])
    # Clipping is tested only where it clips.
    assert min(training.curves.norms) > MAX_NORM
    gradients = {name: gradient.numpy() for name, gradient in training.gradients.items()}
    weights = {name: parameter.detach().numpy() for name, parameter in training.model.named_parameters()}
    return Reference(training.curves, gradients, weights)
