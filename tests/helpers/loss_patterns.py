"""Uses of the losses and logits of calls with labels, each a function of the call and the model."""

import copy

import torch
from torch.nn import functional

from moreh.options import DEFAULT_OPTIONS
from moreh.runtime.engine.fast_path import FastPath
from tests.helpers.compare import worst, worst_of_names
from tests.helpers.fast_path_cases import MAX_TOKENS, batch, gradients
from tests.helpers.float64 import exact_float64


class Calls:
    """A model whose calls the fast path answers where it does, as under the line."""

    def __init__(self, model):
        self.model, self.fast_path = model, FastPath(DEFAULT_OPTIONS)
        self.fast = 0

    def __call__(self, **inputs):
        outputs = self.fast_path.call(self.model, (), inputs, MAX_TOKENS)
        if outputs is NotImplemented:
            return self.model(**inputs)
        self.fast += 1
        return outputs


def worst_difference(pattern, plain):
    """The largest relative difference of a gradient between the fast path and plain torch, over three steps."""
    model = copy.deepcopy(plain)
    calls = Calls(model)
    differences = []
    with exact_float64():
        for _ in range(3):
            pattern(calls, model)
            pattern(plain, plain)
            actual, expected = gradients(model), gradients(plain)
            floor = 1e-6 * max(float(gradient.abs().max()) for gradient in expected.values())
            differences.append(worst_of_names(actual, expected, floor=floor))
            for each in (model, plain):
                torch.optim.SGD(each.parameters(), lr=0.05).step()
                each.zero_grad()
    assert calls.fast > 0
    return worst(differences)


def inputs_of(model, step):
    inputs = batch(model)
    return inputs | {"input_ids": inputs["input_ids"].roll(step, 0), "labels": inputs["labels"].roll(step, 0)}


def weighted(call, model):
    inputs = inputs_of(model, 1)
    logits = call(**inputs).logits[:, :-1].flatten(0, 1)
    weights = torch.linspace(0.5, 2, model.config.vocab_size, dtype=logits.dtype)
    functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten(), weights).backward()


def distilled(call, model):
    outputs = call(**inputs_of(model, 0))
    target = torch.linspace(-1, 1, model.config.vocab_size, dtype=torch.float64).softmax(0).expand_as(outputs.logits)
    divergence = functional.kl_div(outputs.logits.log_softmax(-1), target, reduction="batchmean")
    (0.5 * outputs.loss + 0.5 * divergence).backward()


def z_loss(call, model):
    outputs = call(**inputs_of(model, 0))
    (outputs.loss + 1e-2 * outputs.logits.logsumexp(-1).square().mean()).backward()


def accuracy_then_loss(call, model):
    outputs = call(**inputs_of(model, 0))
    with torch.no_grad():
        outputs.logits.argmax(-1)
    (outputs.loss + outputs.logits.square().mean()).backward()


def retained(call, model):
    loss = call(**inputs_of(model, 0)).loss
    loss.backward(retain_graph=True)
    (3 * loss).backward()


def two_losses(call, model):
    losses = [call(**inputs_of(model, step)).loss for step in range(2)]
    (losses[0] - 0.3 * losses[1]).backward()


def many_losses(call, model):
    sum(call(**inputs_of(model, step)).loss / (step + 1) for step in range(6)).backward()


def losses_in_other_order(call, model):
    losses = [call(**inputs_of(model, step)).loss for step in range(3)]
    for scale, loss in enumerate(reversed(losses), 2):
        (scale * loss).backward()


def one_is_left(call, model):
    unused = call(**inputs_of(model, 0)).loss
    call(**inputs_of(model, 1)).loss.backward()
    assert unused.requires_grad


def chosen_parameters(call, model):
    call(**inputs_of(model, 0)).loss.backward(inputs=[model.lm_head.weight, model.model.norm.weight])


def gradient_of_chosen(call, model):
    chosen = [model.lm_head.weight, model.model.norm.weight]
    losses = [call(**inputs_of(model, step)).loss for step in range(2)]
    grads = [torch.autograd.grad(loss, chosen, retain_graph=True) for loss in losses]
    sum(losses).backward()
    for index, parameter in enumerate(chosen):
        parameter.grad += grads[0][index] * 2 + grads[1][index]


def gradient_penalty(call, model):
    loss = call(**inputs_of(model, 0)).loss
    grads = torch.autograd.grad(loss, [model.lm_head.weight, model.model.norm.weight], create_graph=True)
    (loss + sum(gradient.square().sum() for gradient in grads)).backward()


def grad_norm(call, model):
    """GradNorm: the norms of each task's gradient of a shared layer, and a loss of them."""
    losses = [call(**inputs_of(model, step)).loss for step in range(2)]
    shared = model.model.layers[-1].mlp.down_proj.weight
    norms = [torch.autograd.grad(loss, shared, retain_graph=True, create_graph=True)[0].norm() for loss in losses]
    (sum(losses) + (norms[0] - norms[1]).abs()).backward()


def in_eval_mode(call, model):
    model.eval()
    call(**inputs_of(model, 0)).loss.backward()
    model.train()


def twice_a_call(call, model):
    loss = call(**inputs_of(model, 0)).loss
    (loss + loss.square()).backward()


def refilled(call, model):
    """A loader that fills the same mask and labels for each batch. Autograd would refuse that for ids."""
    mask, labels = (torch.empty_like(batch(model)[name]) for name in ("attention_mask", "labels"))
    losses = []
    for step in range(3):
        inputs = inputs_of(model, step)
        mask.copy_(inputs["attention_mask"].roll(step, 0))
        labels.copy_(inputs["labels"])
        losses.append(call(**inputs | {"attention_mask": mask, "labels": labels}).loss)
    sum(losses).backward()


def logits_of_refilled(call, model):
    """The logits of a call whose mask has been filled again."""
    inputs = inputs_of(model, 0)
    outputs = call(**inputs)
    inputs["attention_mask"].copy_(inputs["attention_mask"].roll(1, 0))
    (outputs.loss + outputs.logits.square().mean()).backward()


PATTERNS = [
    weighted,
    distilled,
    z_loss,
    accuracy_then_loss,
    retained,
    two_losses,
    many_losses,
    losses_in_other_order,
    one_is_left,
    chosen_parameters,
    gradient_of_chosen,
    gradient_penalty,
    grad_norm,
    in_eval_mode,
    twice_a_call,
    refilled,
    logits_of_refilled,
]
