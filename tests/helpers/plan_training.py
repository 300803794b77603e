"""A training as a script writes it, on a model that is whole or divided, and what is kept of it for comparison."""

import copy
import functools
import itertools
from dataclasses import dataclass, field

import numpy as np
import torch

from tests.helpers.float64 import exact_float64
from tests.helpers.plan_cases import CALLS, STEPS, batch, build_model, evaluation_batch

MAX_NORM = 0.5
# Adam divides each gradient by its own size: what is mathematically 0, as the gradients of keys' biases are, would become
# weights made of rounding with the usual 1e-8.
EPSILON = 1e-6
# Before the weights of this step change, and not in the last one: neither the gradients that wait nor the weights that an
# evaluation has gathered may reach the next step in another state.
EVALUATED_STEP = 0


@dataclass
class Curves:
    """What a script sees of its training, and the logits of the evaluation `[row, token, vocabulary]`."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    evaluation: float = float("nan")
    logits: np.ndarray | None = None


@dataclass(frozen=True)
class Training:
    """A finished training. `gradients` are those that the first step was clipped from, by parameter."""

    curves: Curves
    gradients: dict[str, torch.Tensor | None]
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer


def train(model, prepare=lambda model: None, steps=STEPS):
    """Train a model. `prepare` is called with it when the optimizer has been made."""
    numbers = itertools.count()
    curves = Curves()
    gradients = {}
    with exact_float64():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPSILON, weight_decay=0.1)
        prepare(model)
        for step in range(steps):
            total = 0.0
            for _ in range(CALLS[step]):
                loss = model(**batch(next(numbers)), use_cache=False).loss
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
    given = evaluation_batch()
    model.eval()
    with torch.no_grad():
        curves.evaluation = float(model(**given).loss)
        logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    curves.logits = logits.masked_fill(given["attention_mask"][..., None] == 0, 0).numpy()
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
    """What a single process computes: the curves, the first step's gradients and the weights in the end, by parameter."""

    curves: Curves
    gradients: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]


@functools.cache
def reference(family, steps=STEPS):
    """The plain loop of transformers in this process."""
    done = train(new_model(family), steps=steps)
    # A test of clipping clips.
    assert min(done.curves.norms) > MAX_NORM
    gradients = {name: gradient.numpy() for name, gradient in done.gradients.items()}
    weights = {name: parameter.detach().numpy() for name, parameter in done.model.named_parameters()}
    return Reference(done.curves, gradients, weights)
