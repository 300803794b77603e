"""Scripts that read the logits of a call after the optimizer's step."""

import copy
from unittest import mock

import torch

from moreh.planner.plan.plan import Plan
from moreh.runtime.engine.sharded import late_logits
from moreh.runtime.engine.sharded.install import install_sharding_support
from moreh.runtime.engine.sharded.shard_model import shard_model
from tests.helpers.batches import batch
from tests.helpers.compare import max_difference, worst
from tests.helpers.float64 import exact_float64
from tests.helpers.models.families import make_model
from tests.helpers.sharded.cases import error_of, weight_difference


def train(model, *, accumulation=1):
    """Three steps; returns the losses, and the logits that the script reads after each step and refilled inputs."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    read = []
    for step in range(3):
        for index in range(accumulation):
            ids, mask, labels = batch(accumulation * step + index, model.config.vocab_size)
            outputs = model(input_ids=ids, attention_mask=mask, labels=labels)
            (outputs.loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
        ids.zero_()
        mask.zero_()
        read += [outputs.loss.detach(), outputs.logits.detach().clone()]
    return read


def compare(family, plan, accumulation=1):
    """The largest difference of a loss or a logit from those of a whole model, and that of a weight."""
    install_sharding_support()
    whole = make_model(family)
    sharded = copy.deepcopy(whole)
    with exact_float64():
        expected = train(whole, accumulation=accumulation)
        runner = shard_model(sharded, Plan(**plan))
        read = train(sharded, accumulation=accumulation)
    differences = worst(max_difference(own, other) for own, other in zip(read, expected, strict=True))
    return differences, weight_difference(runner.model, whole)


def compare_without_exchange(family, plan):
    with mock.patch.object(late_logits.LateLogits, "_exchange_weights"):
        return compare(family, plan)


def _sharded(plan):
    install_sharding_support()
    model = make_model("llama")
    shard_model(model, Plan(**plan))
    ids, _, labels = batch(0, model.config.vocab_size)
    return model, ids, labels, torch.optim.SGD(model.parameters(), lr=0.1)


def what_is_said(plan):
    """Errors of reads that come too late, and whether logits that are read after a step have gradients."""
    model, ids, labels, optimizer = _sharded(plan)

    def call():
        outputs = model(input_ids=ids, labels=labels)
        outputs.loss.backward()
        return outputs

    embeds = torch.zeros(*ids.shape, model.config.hidden_size, dtype=torch.float64)
    changed = model(inputs_embeds=embeds, labels=labels)
    embeds.add_(1)
    said = {"changed inputs": error_of(lambda: changed.logits)}
    by_hand = call()
    with torch.no_grad():
        next(model.parameters()).mul_(0.5)
    said["changed by hand"] = error_of(lambda: by_hand.logits)
    of_first_step = call()
    optimizer.step()
    said["gradients after a step"] = of_first_step.logits.requires_grad
    return said


def second_step(plan):
    """The error of a read after the second step, whose logits no earlier step lets expect."""
    model, ids, labels, optimizer = _sharded(plan)
    for _ in range(2):
        outputs = model(input_ids=ids, labels=labels)
        outputs.loss.backward()
        optimizer.step()
    return error_of(lambda: outputs.logits)


def after_the_step_of_another_model(plan):
    """The largest difference of logits that are read after a step of another model and one of their own."""
    model, ids, labels, optimizer = _sharded(plan)
    other = torch.nn.Linear(2, 1)
    expected = model(input_ids=ids).logits.detach().clone()
    outputs = model(input_ids=ids, labels=labels)
    other(torch.ones(2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    outputs = model(input_ids=ids, labels=labels)
    outputs.loss.backward()
    optimizer.step()
    return max_difference(outputs.logits, expected)


def without_memory(plan):
    """The error of every rank where one has no memory for the copies."""
    free_bytes = 0 if torch.distributed.get_rank() == 1 else 2**40
    with mock.patch.object(late_logits, "free_bytes", return_value=free_bytes):
        return error_of(lambda: compare("llama", plan))
