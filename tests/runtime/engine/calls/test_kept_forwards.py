"""The second pass of a custom loss uses the forward passes of the first pass that were kept."""

import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moreh.runtime.engine.calls import kept_forwards
from moreh.runtime.engine.calls.kept_forwards import KeptForwards
from moreh.runtime.engine.sharded.install import install_sharding_support
from moreh.runtime.engine.sharded.shard_model import shard_model
from moreh.runtime.pipeline.stage import Stage
from tests.helpers.compare import worst_of_names
from tests.helpers.float64 import exact_float64
from tests.helpers.plans.cases import batch, plan_of
from tests.helpers.plans.training import custom_loss, new_model
from tests.helpers.sharded.cases import error_of
from tests.helpers.workers import run_on_workers

# How often each rank computes a micro-batch with one of its stages, in the first pass and in the second pass.
COMPUTED = {
    "dp4 mb2x1 shard:parameters": [(1, 0)] * 4,
    "dp2 tp2 mb2x2": [(2, 1)] * 4,
    "dp2 tp2 mb1x4 sp recompute:full": [(4, 3)] * 4,
    "pp4 mb2x4": [(4, 0), (4, 1), (4, 2), (4, 3)],
    "pp2 tp2 mb2x4 recompute:selective": [(4, 2)] * 2 + [(4, 3)] * 2,
    "pp2 dp2 mb1x4 shard:parameters": [(4, 2)] * 2 + [(4, 3)] * 2,
    # Each rank has two stages.
    "pp2 tp2 mb2x4 zbv": [(8, 6)] * 2 + [(8, 7)] * 2,
    "pp2 dp2 mb1x4 interleaved:2": [(8, 6)] * 2 + [(8, 7)] * 2,
    "pp4 mb2x4 zero-bubble:2": [(8, 4), (8, 5), (8, 6), (8, 7)],
}
FEW = ("dp2 tp2 mb2x2", "pp2 tp2 mb2x4", "dp4 mb2x1 shard:parameters")


def on_workers(function, notation):
    """What the four ranks return for the plan."""
    return run_on_workers(function, [(plan_of("llama", notation, 4),)], size=4)[0]


@pytest.mark.parametrize("notation", COMPUTED)
def test_kept_forwards_are_not_repeated(notation):
    results = on_workers(count_computed, notation)
    assert [computed for computed, _ in results] == COMPUTED[notation]
    assert max(difference for _, difference in results) < 1e-12


@pytest.mark.parametrize("notation", FEW)
def test_only_the_latest_call_keeps_forwards(notation):
    for computed in on_workers(count_after_other_calls, notation):
        in_both_passes, again, after_training, second_of_graph = computed
        assert again == after_training == second_of_graph == in_both_passes


@pytest.mark.parametrize("notation", FEW)
@pytest.mark.parametrize("precision", ["float64", "autocast"])
def test_gradients_of_several_calls(notation, precision):
    assert max(on_workers(CALLS[precision], notation)) < {"float64": 1e-12, "autocast": 1e-6}[precision]


@pytest.mark.parametrize("notation", FEW[:2])
def test_comparison_finds_forwards_of_other_micro_batches(notation):
    assert all(difference > 1e-6 for _, difference in on_workers(count_with_other_micro_batches, notation))


@pytest.mark.parametrize("notation", FEW)
def test_short_memory_of_one_rank_is_that_of_all(notation):
    assert on_workers(count_with_short_memory, notation) == [0] * 4


def test_activations_are_freed_with_the_logits():
    assert on_workers(is_alive, "dp2 tp2 mb2x2") == [(True, False, False)] * 4


def test_activations_are_freed_before_the_weights_change():
    assert on_workers(is_alive_after_steps, "dp2 tp2 mb2x2") == [(True, False)] * 4


@pytest.mark.parametrize("notation", FEW)
def test_replaced_weights_are_an_error(notation):
    for error in on_workers(changed_by_data, notation):
        assert "modified by an inplace operation" in error


def test_kept_forwards_share_copies_of_weights():
    assert on_workers(copies_of_weights, "pp2 tp2 mb2x4") == [1] * 4


def make_pair(plan, dtype=torch.float64):
    """A whole model and the same one sharded."""
    install_sharding_support()
    whole, sharded = (new_model("llama").to(dtype) for _ in range(2))
    shard_model(sharded, plan)
    return whole, sharded


def grads_of(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@contextmanager
def counted():
    """A list that grows with each forward pass of a stage."""
    with mock.patch.object(Stage, "_compute", autospec=True, side_effect=Stage._compute) as compute:
        yield compute.call_args_list


def count_computed(plan):
    """The stages' forward passes in the first and in the second pass, and the difference of gradients."""
    whole, sharded = make_pair(plan)
    with exact_float64(), counted() as computed:
        loss = custom_loss(sharded, batch(0))
        in_first = len(computed)
        loss.backward()
        custom_loss(whole, batch(0)).backward()
        in_second = len(computed) - in_first
        return (in_first, in_second), worst_of_names(grads_of(sharded), grads_of(whole))


def count_with_other_micro_batches(plan):
    """The same where each kept forward pass is used for another micro-batch, or with other rows."""
    in_second_pass = KeptForwards.in_second_pass

    def exchanged(self, kept):
        outputs = kept.outputs
        kept.outputs = {index: _with_other_rows(outputs[max(outputs) - index]) for index in outputs}
        return in_second_pass(self, kept)

    with mock.patch.object(KeptForwards, "in_second_pass", exchanged):
        return count_computed(plan)


def _with_other_rows(outputs):
    if isinstance(outputs, torch.Tensor):
        return outputs
    with torch.enable_grad():
        outputs.logits = outputs.logits.roll(1, 1)
    return outputs


def count_with_short_memory(plan):
    """The number of forward passes of the second pass that are not repeated, where rank 3 has no free memory."""
    has_memory = dist.get_rank() < 3
    with mock.patch.object(kept_forwards, "free_bytes", return_value=2**40 if has_memory else 0):
        (in_first, in_second), difference = count_computed(plan)
    assert difference < 1e-12
    return in_first - in_second


def count_after_other_calls(plan):
    """Forward passes of a second pass after another first pass, after a training step, and of a graph's second use."""
    _, sharded = make_pair(plan)
    with counted() as computed:

        def count_backward(loss, **arguments):
            before = len(computed)
            loss.backward(**arguments)
            return len(computed) - before

        losses = [custom_loss(sharded, batch(index)) for index in range(2)]
        in_first = len(computed) // 2
        again = count_backward(losses[0])
        latest = count_backward(losses[1], retain_graph=True)
        assert latest <= in_first
        second_of_graph = count_backward(losses[1])
        loss = custom_loss(sharded, batch(2))
        sharded(**batch(3)).loss.backward()
        return in_first, again, count_backward(loss), second_of_graph


def grads_of_several_calls(plan):
    """The difference of gradients after three calls, whose backward passes come later, one of them twice."""
    whole, sharded = make_pair(plan)
    with exact_float64():
        for model in (whole, sharded):
            call_and_differentiate(model, nullcontext())
        return worst_of_names(grads_of(sharded), grads_of(whole))


def autocast_grads_of_several_calls(plan):
    """The same between a model that uses kept forward passes and one that drops them, under autocast."""
    grads = []
    for context in (nullcontext(), mock.patch.object(KeptForwards, "in_second_pass", _dropping)):
        model = make_pair(plan, torch.float32)[1]
        with context:
            call_and_differentiate(model, torch.autocast("cpu", torch.bfloat16))
        grads.append(grads_of(model))
    return worst_of_names(*grads)


def _dropping(self, kept):
    kept.take()
    return nullcontext()


CALLS = {"float64": grads_of_several_calls, "autocast": autocast_grads_of_several_calls}


def call_and_differentiate(model, context):
    with context:
        losses = [custom_loss(model, batch(index)) for index in range(3)]
    losses[1].backward(retain_graph=True)
    losses[2].backward()
    (2 * losses[1] + losses[0]).backward()


def is_alive(plan):
    """True if activations of a call live: before its backward pass, after it, and without its loss."""
    _, sharded = make_pair(plan)
    with activations_of(sharded) as activations:
        alive = []
        loss = custom_loss(sharded, batch(0))
        alive.append(activations[0]() is not None)
        loss.backward()
        alive.append(activations[0]() is not None)
        activations.clear()
        loss = custom_loss(sharded, batch(1))
        del loss
        alive.append(activations[0]() is not None)
    return tuple(alive)


def is_alive_after_steps(plan):
    """True if activations of logits that are only looked at live: after a step of another optimizer, and of its own."""
    _, sharded = make_pair(plan)
    other = torch.nn.Linear(2, 2)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (other, sharded)]
    outputs = sharded(**batch(0))
    outputs.loss.backward()
    with activations_of(sharded) as activations:
        outputs.logits.argmax(-1)
        alive = []
        for optimizer in optimizers:
            optimizer.step()
            alive.append(activations[0]() is not None)
    return tuple(alive)


@contextmanager
def activations_of(model):
    """Weak references to activations that the graph of the first layer saves, one for each forward pass."""
    activations = []
    module = model.model.layers[0].mlp.act_fn
    handle = module.register_forward_hook(lambda module, args, output: activations.append(weakref.ref(output)))
    yield activations
    handle.remove()


def changed_by_data(plan):
    """The error of a backward pass after a weight was replaced by `p.data = ...`."""
    _, sharded = make_pair(plan)
    loss = custom_loss(sharded, batch(0))
    parameter = sharded.model.norm.weight
    parameter.data = parameter.data * 2
    return error_of(loss.backward)


def copies_of_weights(plan):
    """The largest number of copies that the kept forward passes have of a weight under autocast."""
    install_sharding_support()
    model = new_model("llama").float()
    runner = shard_model(model, plan)
    with torch.autocast("cpu", torch.bfloat16):
        logits = custom_loss(model, batch(0))
    outputs = runner._kept_forwards._latest().outputs.values()
    nodes = [(output if isinstance(output, torch.Tensor) else output.logits).grad_fn for output in outputs]
    visited = set(nodes)
    while nodes:
        following = {node for node, _ in nodes.pop().next_functions if node is not None} - visited
        visited |= following
        nodes += following
    copied = [node.next_functions[0][0] for node in visited if node.name() == "ToCopyBackward0"]
    assert logits.requires_grad
    return max(Counter(node for node in copied if node.name() == "torch::autograd::AccumulateGrad").values())
