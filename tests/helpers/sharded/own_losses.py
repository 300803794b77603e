"""Losses that scripts make of logits, trained on a whole and on a sharded model."""

import copy
import functools
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from moreh.planner.plan.plan import Plan
from moreh.runtime.batch.model_inputs import read_inputs
from moreh.runtime.engine.calls.output_layer import OutputLayer
from moreh.runtime.engine.evaluation import evaluate_unsharded
from moreh.runtime.engine.sharded.install import install_sharding_support
from moreh.runtime.engine.sharded.shard_model import shard_model
from moreh.runtime.kernels import allocator
from tests.helpers.batches import ROWS, batch
from tests.helpers.compare import curve_difference, max_difference, relative_difference
from tests.helpers.float64 import exact_float64
from tests.helpers.models.families import make_model
from tests.helpers.plans.training import new_model
from tests.helpers.sharded.cases import error_of, weight_difference


def weighted_tokens(model, frozen, ids, mask, labels):
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    weights = torch.linspace(0.2, 2, logits.shape[-1], dtype=logits.dtype)
    return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), weights)


def label_smoothing(model, frozen, ids, mask, labels):
    logits = model(ids, attention_mask=mask, labels=labels, return_dict=False)[1][:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1)


def distillation(model, frozen, ids, mask, labels):
    outputs = model(input_ids=ids, attention_mask=mask, labels=labels)
    with torch.no_grad():
        target = frozen(input_ids=ids, attention_mask=mask).logits.softmax(-1)
    divergence = functional.kl_div(outputs.logits.log_softmax(-1), target, reduction="none").sum(-1)
    return 0.3 * outputs.loss + 0.7 * (divergence * mask).sum() / mask.sum()


def z_loss(model, frozen, ids, mask, labels):
    outputs = model(input_ids=ids, attention_mask=mask, labels=labels)
    return outputs[0] + 1e-2 * (outputs[1].logsumexp(-1).square() * mask).mean()


def _log_probability(model, ids, mask):
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return (logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum(-1)


def dpo(model, frozen, ids, mask, labels):
    """Of preferred and other answers, a row each."""
    with torch.no_grad():
        references = [_log_probability(frozen, ids, mask), _log_probability(frozen, ids.roll(1, 1), mask)]
    preferred = _log_probability(model, ids, mask) - references[0]
    other = _log_probability(model, ids.roll(1, 1), mask) - references[1]
    return -functional.logsigmoid(0.1 * (preferred - other)).mean()


def last_position(model, frozen, ids, mask, labels):
    """A reward of the last position, which the script asks for."""
    return functional.softplus(-model(input_ids=ids, attention_mask=mask, logits_to_keep=1).logits[:, 0, 3]).mean()


def refilled_mask(model, frozen, ids, mask, labels):
    """A mask that the script fills again before the backward pass."""
    buffer = mask.clone()
    logits = model(input_ids=ids, attention_mask=buffer).logits[:, :-1]
    buffer.copy_(mask.roll(1, 0))
    return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


LOSSES = {
    loss.__name__: loss
    for loss in (weighted_tokens, label_smoothing, distillation, z_loss, dpo, last_position, refilled_mask)
}


def train_with(name, model, frozen, steps=2, accumulation=2):
    """Train with a loss of the script's own; the losses and norms that it sees."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    curve = []
    for step in range(steps):
        for index in range(accumulation):
            # The last batch of an epoch is smaller.
            rows = ROWS - 3 if (step, index) == (1, 1) else ROWS
            ids, mask, labels = batch(accumulation * step + index, model.config.vocab_size, rows=rows)
            loss = LOSSES[name](model, frozen, ids, mask, labels)
            (loss / accumulation).backward()
            curve.append(loss.item())
        curve.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return curve


def compare(name, family, plan, change_second_pass=None):
    """The largest relative difference of losses and norms, and that of a weight, from a whole model's training."""
    return _compare(name, make_model, family, Plan(**plan), change_second_pass)


def compare_deep(name, plan):
    """The same for a Llama with layers for pipelines of many stages."""
    return _compare(name, new_model, "llama", plan)


def _compare(name, make, family, plan, change_second_pass=None):
    install_sharding_support()
    initial, frozen, expected, whole = _trained_whole(name, make, family)
    sharded = copy.deepcopy(initial)
    with exact_float64():
        runner = shard_model(sharded, plan)
        if change_second_pass is not None:
            change_second_pass(runner)
        curve = train_with(name, sharded, frozen)
    return curve_difference(curve, expected), weight_difference(runner.model, whole)


@functools.cache
def _trained_whole(name, make, family):
    """A model, the frozen one beside it, the losses and norms of the model's training, and what the training makes."""
    initial = make(family)
    whole, frozen = copy.deepcopy(initial), copy.deepcopy(initial)
    with torch.no_grad():
        for parameter in frozen.parameters():
            parameter.mul_(0.9)
    with exact_float64():
        return initial, frozen, train_with(name, whole, frozen), whole


def with_wrong_part(runner):
    """Give the second pass the gradients of the rows of another micro-batch, or of other tokens."""
    second_pass = runner._second_pass
    passes = runner._logits_passes
    object.__setattr__(
        passes,
        "second_pass",
        lambda micro_batches, seed, grads: second_pass(micro_batches, seed, [grad.roll(1, 1) for grad in grads]),
    )


def compare_with_wrong_part(name, family, plan):
    return compare(name, family, plan, with_wrong_part)


def compare_without_comparison(name, family, plan):
    """As `compare`, where the second pass takes any logits for the outputs of the output layer."""
    with mock.patch.object(OutputLayer, "compare"):
        return compare(name, family, plan)


def leaves_out_outputs(family, plan):
    """True if this rank's second pass computes no outputs of the output layer."""
    install_sharding_support()
    model = make_model(family)
    shard_model(model, Plan(**plan))
    ids, mask, _ = batch(0, model.config.vocab_size)
    loss = model(input_ids=ids, attention_mask=mask).logits.square().mean()
    with mock.patch.object(OutputLayer, "_forward_without_outputs", autospec=True) as left_out:
        left_out.side_effect = lambda layer, hidden: nn.Linear.forward(layer._head, hidden)
        loss.backward()
    return left_out.called


def steps_that_keep_memory(plan):
    """The numbers of the backward passes of a loss of logits in which freed memory is kept."""
    install_sharding_support()
    model = make_model("llama")
    shard_model(model, Plan(**plan))
    ids, mask, _ = batch(0, model.config.vocab_size)
    with mock.patch.object(allocator, "before_training_step") as before:
        for _ in range(2):
            model(input_ids=ids, attention_mask=mask).logits.square().mean().backward()
    return [call.args[0] for call in before.call_args_list]


def logits_in_autocast(family, plan):
    """Logits in bfloat16, with gradients and without, and a gradient: the largest differences from a whole model."""
    install_sharding_support()
    whole = make_model(family).float()
    sharded = copy.deepcopy(whole)
    shard_model(sharded, Plan(**plan))
    ids, mask, _ = batch(0, whole.config.vocab_size)
    read = []
    for model in (whole, sharded):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=mask).logits
            evaluated = torch.no_grad()(model)(input_ids=ids, attention_mask=mask).logits
        assert logits.dtype == evaluated.dtype == torch.bfloat16
        logits.float().square().mean().backward()
        read.append([logits.float(), evaluated.float(), model.get_output_embeddings().weight.grad.clone()])
    return [relative_difference(of_sharded, of_whole) for of_whole, of_sharded in zip(*read, strict=True)]


def dropout_of_both_passes(family, plan):
    """Gradients of one sharded model with dropout, from the built-in way of calling it and by finite differences.

    Returns the relative difference of the directional derivative along the gradient.
    """
    install_sharding_support()
    model = make_model(family, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    shard_model(model, Plan(**plan))
    ids, mask, _ = batch(0, model.config.vocab_size)

    def loss():
        torch.manual_seed(7)
        return model(input_ids=ids, attention_mask=mask).logits.square().mean()

    with exact_float64():
        value = loss()
        value.backward()
        squared = _squared_norm_of_grads(model)
        step = 1e-5 / squared**0.5
        grads = {parameter: parameter.grad for parameter in model.parameters()}
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for parameter, grad in grads.items():
                    parameter.add_(grad, alpha=sign * step)
            values.append(loss().item())
            with torch.no_grad():
                for parameter, grad in grads.items():
                    parameter.sub_(grad, alpha=sign * step)
    return abs((values[0] - values[1]) / (2 * step) - squared) / squared


def _squared_norm_of_grads(model):
    """The sum of the squares of all gradients, of whole tensors."""
    return sum(parameter.grad.square().sum().item() for parameter in model.parameters())


def what_is_said(plan):
    """Errors of what a sharded model cannot do with logits."""
    install_sharding_support()
    model = make_model("llama")
    shard_model(model, Plan(**plan))
    ids, _, labels = batch(0, model.config.vocab_size)

    def twice():
        loss = model(input_ids=ids).logits.square().mean()
        loss.backward()
        loss.backward()

    def after_a_step():
        model(input_ids=ids, labels=labels).loss.backward()
        loss = model(input_ids=ids).logits.square().mean()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        loss.backward()

    def differentiated():
        loss = model(input_ids=ids).logits.square().mean()
        parameter = next(model.parameters())
        grad = torch.autograd.grad(loss, parameter, create_graph=True)[0]
        grad.square().sum().backward()

    def soft_prompt():
        embeds = torch.zeros(*ids.shape, model.config.hidden_size, dtype=torch.float64, requires_grad=True)
        model(inputs_embeds=embeds)

    return {
        "twice": error_of(twice),
        "backward after a step": error_of(after_a_step),
        "create_graph": error_of(differentiated),
        "soft prompt": error_of(soft_prompt),
        "class": type(model(input_ids=ids, labels=labels)).__name__,
    }


def retained(plan):
    """The gradient of two backward passes through one graph, as a multiple of that of one."""
    install_sharding_support()
    model = make_model("llama")
    shard_model(model, Plan(**plan))
    ids, mask, _ = batch(0, model.config.vocab_size)
    norms = []
    for passes in (1, 2):
        model.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask).logits.square().mean()
        for index in range(passes):
            loss.backward(retain_graph=index + 1 < passes)
        norms.append(_squared_norm_of_grads(model) ** 0.5)
    return norms[1] / norms[0]


def unsharded_evaluation(size):
    """The largest differences of the loss and the logits of a whole model whose rows the workers share."""
    model = make_model("llama").eval()
    ids, mask, labels = batch(0, model.config.vocab_size, rows=7)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with exact_float64(), torch.no_grad():
        own = model(**inputs)
        world = SimpleNamespace(rank=dist.get_rank(), size=size)
        outputs = evaluate_unsharded(model, read_inputs(model, (), inputs), world)
        return max_difference(outputs.loss, own.loss), max_difference(outputs.logits, own.logits)
