"""A loss of the script's own takes one function more: a z-loss, on one worker and with the vocabulary split over two.

The z-loss is the cross-entropy plus a multiple of the squared log-partition function of each label token, as in PaLM,
https://arxiv.org/abs/2204.02311, section 5.
"""

import functools

import pytest
import torch
from torch.nn import functional

from moreh.models import losses
from moreh.models.losses import IGNORED_LABEL, register_token_loss
from moreh.options import DEFAULT_OPTIONS
from moreh.planner.plan.plan import Plan
from moreh.runtime.engine.fast_path import FastPath
from moreh.runtime.engine.sharded.install import install_sharding_support
from moreh.runtime.engine.sharded.shard_model import shard_model
from moreh.runtime.tensor.vocab_parallel import vocab_parallel_cross_entropy, vocab_parallel_logsumexp
from tests.helpers.batches import batch as ids_mask_and_labels
from tests.helpers.compare import relative_difference
from tests.helpers.fast_path_cases import MAX_TOKENS, batch, differences
from tests.helpers.float64 import exact_float64
from tests.helpers.models.families import PP_TP, make_model
from tests.helpers.sharded import cases
from tests.helpers.workers import run_on_workers

COEFFICIENT = 1e-4
PLANS = {
    "tp2": {"stage_layers": (3,), "tensor": 2, "micro_batch_size": 8},
    "tp2 sequence": {"stage_layers": (3,), "tensor": 2, "micro_batch_size": 8, "sequence_parallel": True},
    "tp2 pp2": PP_TP,
}


def z_loss(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **kwargs):
    """What the script gives its model, as transformers calls it."""
    if shift_labels is None:
        shift_labels = functional.pad(labels, (0, 1), value=IGNORED_LABEL)[..., 1:]
    logits, labels = logits.view(-1, vocab_size), shift_labels.flatten()
    log_z = torch.logsumexp(logits, -1)
    token_losses = functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED_LABEL)
    token_losses = token_losses + COEFFICIENT * (log_z**2).masked_fill(labels == IGNORED_LABEL, 0)
    return token_losses.sum() / ((labels != IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch)


def token_z_loss(local_logits, labels, group, vocabulary_size, coefficient=COEFFICIENT):
    """The same, token by token, where each rank has the logits of a part of the vocabulary."""
    cross_entropy = vocab_parallel_cross_entropy(local_logits, labels, group, vocabulary_size)
    log_z = vocab_parallel_logsumexp(local_logits, group)
    return cross_entropy + coefficient * (log_z**2).masked_fill(labels == IGNORED_LABEL, 0)


def use_z_loss(model, coefficient=COEFFICIENT):
    register_token_loss(z_loss, functools.partial(token_z_loss, coefficient=coefficient))
    model.loss_function = z_loss
    return model


@pytest.fixture
def no_registered_losses(monkeypatch):
    monkeypatch.setattr(losses, "_token_losses", [])


pytestmark = pytest.mark.usefixtures("no_registered_losses", "few_label_positions")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_worker_computes_a_registered_loss(family):
    model = use_z_loss(make_model(family))
    assert max(differences(model, batch(model))) < 1e-9
    assert max(differences(model, batch(model, num_items_in_batch=torch.tensor(17)))) < 1e-9


def test_comparison_on_one_worker_finds_a_wrong_coefficient():
    model = use_z_loss(make_model("llama"), coefficient=1.01 * COEFFICIENT)
    assert min(differences(model, batch(model))) > 1e-7


def test_cross_entropy_is_computed_where_no_loss_is_given():
    use_z_loss(make_model("llama"))
    model = make_model("llama")
    assert max(differences(model, batch(model))) < 1e-9


def test_loss_that_is_not_registered_is_left_to_the_model():
    model = make_model("llama")
    model.loss_function = z_loss
    assert FastPath(DEFAULT_OPTIONS).call(model, (), batch(model), MAX_TOKENS) is NotImplemented


def compare(plan, coefficient):
    """On each rank: the training of a sharded model beside that of a whole one, both with the z-loss."""
    return cases.compare("llama", plan, functools.partial(use_z_loss, coefficient=coefficient))


@pytest.mark.parametrize("name", PLANS)
def test_workers_compute_a_registered_loss(name):
    plan = PLANS[name]
    for curve_difference, weight_difference in run_on_workers(
        compare, [(plan, COEFFICIENT)], size=Plan(**plan).devices
    )[0]:
        assert curve_difference < 1e-9
        assert weight_difference < 1e-9


def test_comparison_on_workers_finds_a_wrong_coefficient():
    for curve_difference, weight_difference in run_on_workers(compare, [(PLANS["tp2"], 1.01 * COEFFICIENT)], size=2)[0]:
        assert curve_difference > 1e-7
        assert weight_difference > 1e-7


def evaluate(plan):
    """On each rank: the relative difference of an evaluation from that of a whole model."""
    whole, sharded, _ = cases.sharded_copy("llama", plan)
    ids, mask, labels = ids_mask_and_labels(0, whole.config.vocab_size)
    with torch.no_grad(), exact_float64():
        values = [
            use_z_loss(model.eval())(input_ids=ids, attention_mask=mask, labels=labels).loss
            for model in (sharded, whole)
        ]
    return relative_difference(*values)


def test_evaluation_on_workers_computes_a_registered_loss():
    assert max(run_on_workers(evaluate, [(PLANS["tp2"],)], size=2)[0]) < 1e-9


def errors_of_unregistered_loss(plan):
    """On each rank: what is said to a loss that is not registered, before a model is sharded and afterwards."""
    install_sharding_support()
    losses._token_losses.clear()
    model = make_model("llama")
    model.loss_function = z_loss
    before = cases.error_of(lambda: shard_model(model, Plan(**plan)))
    _, model, _ = cases.sharded_copy("llama", plan)
    model.loss_function = z_loss
    ids, mask, labels = ids_mask_and_labels(0, model.config.vocab_size)
    return before, cases.error_of(lambda: model(input_ids=ids, attention_mask=mask, labels=labels))


def test_workers_refuse_a_loss_that_is_not_registered():
    for before, afterwards in run_on_workers(errors_of_unregistered_loss, [(PLANS["tp2"],)], size=2)[0]:
        assert "has a loss of its own" in before
        assert "which is not computed on several workers" in before
        assert "z_loss" in afterwards
        assert "moreh.models.losses.register_token_loss, or run on 1 worker" in afterwards
