"""What scripts do with losses and logits of calls with labels, beside what plain transformers gives for it."""

import weakref
from unittest import mock

import pytest
import torch

from moreh.runtime.engine.model_runner import ModelRunner
from tests.helpers.compare import relative_difference, worst_of_names
from tests.helpers.fast_path_cases import LENGTH, batch, gradients
from tests.helpers.loss_patterns import (
    PATTERNS,
    Calls,
    chosen_parameters,
    grad_norm,
    gradient_penalty,
    inputs_of,
    many_losses,
    retained,
    two_losses,
    worst_difference,
    z_loss,
)
from tests.helpers.models.families import make_model

pytestmark = pytest.mark.usefixtures("few_label_positions")


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.__name__)
def test_gradients_are_those_of_plain_torch(pattern):
    assert worst_difference(pattern, make_model("llama")) < 1e-9


@pytest.mark.parametrize("pattern", [z_loss, retained, many_losses, chosen_parameters, gradient_penalty, grad_norm])
def test_other_uses_are_left_to_the_models_own_forward_once_they_are_known(pattern):
    model = make_model("llama")
    calls = Calls(model)
    pattern(calls, model)
    fast = calls.fast
    pattern(calls, model)
    assert calls.fast == fast


def test_usual_loop_and_two_losses_stay_on_the_fast_path():
    model = make_model("llama")
    calls = Calls(model)
    calls(**inputs_of(model, 0))  # a loss that nobody uses
    for step in range(8):
        calls(**inputs_of(model, step)).loss.backward()
        two_losses(calls, model)
    assert calls.fast == 25


def test_rare_reads_leave_the_fast_path_on():
    model = make_model("llama")
    calls = Calls(model)
    for step in range(20):
        outputs = calls(**inputs_of(model, step))
        outputs.loss.backward()
        if step % 8 == 7:
            assert outputs.logits.shape[1] == LENGTH
    assert calls.fast == 20


def test_most_parameters_by_name_stay_on_the_fast_path():
    model = make_model("llama")
    calls, most = Calls(model), list(model.parameters())[1:]
    assert 2 * sum(p.numel() for p in most) > sum(p.numel() for p in model.parameters())
    for step in range(2):
        calls(**inputs_of(model, step)).loss.backward(inputs=most)
        torch.autograd.grad(calls(**inputs_of(model, step)).loss, most)
    assert calls.fast == 4


def counted_passes(monkeypatch):
    """Counts the passes that a runner makes: those with gradients and those without."""
    passes = []
    train, evaluate = ModelRunner._train, ModelRunner._evaluate
    monkeypatch.setattr(ModelRunner, "_train", lambda *args: passes.append("_train") or train(*args))
    monkeypatch.setattr(ModelRunner, "_evaluate", lambda *args: passes.append("_evaluate") or evaluate(*args))
    return passes


def test_evaluation_with_gradients_on_computes_no_gradients(monkeypatch):
    model = make_model("llama").eval()
    calls, passes = Calls(model), counted_passes(monkeypatch)
    total = sum(calls(**inputs_of(model, step)).loss for step in range(3))
    assert total.requires_grad
    assert passes == ["_evaluate"] * 3
    model.train()
    kept = [calls(**inputs_of(model, step)).loss for step in range(3)]
    # One set of gradients is kept for all losses.
    assert passes[3:] == ["_train", "_evaluate", "_evaluate"]
    assert len(kept) == 3


def test_training_in_eval_mode_computes_each_step_once_from_the_second_on(monkeypatch):
    model = make_model("llama").eval()
    calls, passes = Calls(model), counted_passes(monkeypatch)
    for step in range(3):
        calls(**inputs_of(model, step)).loss.backward()
    assert passes == ["_evaluate", "_train", "_train", "_train"]


@pytest.mark.parametrize("optimizers", [1, 2])
def test_logits_can_be_read_after_the_step(optimizers):
    model = make_model("llama")
    calls = Calls(model)
    whole = model(**inputs_of(model, 0)).logits
    outputs = calls(**inputs_of(model, 0))
    outputs.loss.backward()
    parameters = list(model.parameters())
    for part in range(optimizers):
        torch.optim.AdamW(parameters[part::optimizers], lr=0.1).step()
    model.zero_grad()
    assert relative_difference(outputs.logits, whole) < 1e-5
    # A script that reads so late gets all from one pass from now on.
    calls(**inputs_of(model, 0))
    assert calls.fast == 1


def test_losses_after_the_step_are_refused_as_in_torch():
    model = make_model("llama")
    calls = Calls(model)
    for call in (model, calls):
        losses = [call(**inputs_of(model, step)).loss for step in range(2)]
        losses[0].backward()
        torch.optim.SGD(model.parameters(), lr=0.05).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            losses[1].backward()
        model.zero_grad()


def test_a_second_backward_pass_is_refused_as_in_torch():
    model = make_model("llama")
    for call in (model, Calls(model)):
        loss = call(**inputs_of(model, 0)).loss
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


def test_dropout_and_the_scripts_random_numbers_are_those_of_the_call():
    model = make_model("gpt2", resid_pdrop=0.3, embd_pdrop=0.3)
    model_inputs = batch(model)
    torch.manual_seed(3)
    expected = model(**model_inputs | {"labels": None}).logits
    after = torch.rand(1)
    calls = Calls(model)
    torch.manual_seed(3)
    outputs = calls(**model_inputs)
    state = torch.get_rng_state()
    assert relative_difference(outputs.logits, expected) < 1e-5
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    calls(**model_inputs | {"labels": None})
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradients_computed_late_are_of_the_dropout_of_the_loss(mode):
    """The gradients of a loss that was not expected to be used, against those of the same loss computed at once."""
    model = make_model("gpt2", resid_pdrop=0.3, embd_pdrop=0.3)
    results = []
    for kept in (0, 1):
        model.zero_grad()
        calls = Calls(model)
        unused = [calls(**batch(model)).loss for _ in range(kept)]
        torch.manual_seed(5)
        loss = calls(**batch(model)).loss
        torch.rand(7)
        getattr(model, mode)()
        loss.backward()
        model.train()
        results.append((loss.item(), gradients(model), len(unused)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert worst_of_names(results[1][1], results[0][1], floor=1e-6) < 1e-4


def test_inputs_are_freed_by_the_backward_pass():
    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor

    kept = weakref.WeakSet()

    def pack(tensor):
        packed = Kept(tensor)
        kept.add(packed)
        return packed

    model = make_model("llama")
    calls = Calls(model)
    # Hooks of a script have the model's own forward pass. These shall see the tensors of the fast path.
    with (
        mock.patch("moreh.runtime.engine.fast_path.observer_of_operations", return_value=None),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor),
    ):
        total = calls(**inputs_of(model, 0)).loss
    assert {len(packed.tensor) for packed in kept} == {len(inputs_of(model, 0)["input_ids"])}
    total.backward()
    assert not kept
