"""Several workers refuse what they would compute differently from one."""

import pytest
import torch
from torch import nn

from moreh.errors import OptionError
from moreh.runtime.engine.calls.checks import check_functional_call
from tests.helpers.sharded import unusual_calls
from tests.helpers.workers import run_on_workers

WHOLE = {"stage_layers": (3,)}
PLANS = {
    "tp2": {**WHOLE, "tensor": 2, "micro_batch_size": 8},
    "pp2": {"stage_layers": (2, 1), "pipeline": 2, "micro_batches": 2, "micro_batch_size": 4},
    "dp2-sharded": {**WHOLE, "data": 2, "micro_batches": 2, "micro_batch_size": 2, "sharding": "parameters"},
}
BY_STAGES_AND_ROWS = ["pp2", "dp2-sharded"]


def on_workers(function, *arguments):
    return run_on_workers(function, [arguments])[0]


@pytest.mark.parametrize("plan", PLANS)
def test_calls_with_wrong_ids_caches_and_noise(plan):
    for expected, actual, cache, noise, losses in on_workers(unusual_calls.errors_of_calls, PLANS[plan]):
        assert all(error.startswith("IndexError: ") for error in expected)
        assert actual == expected
        assert "past_key_values: a model on several workers keeps no cache" in cache
        assert "its noise depends on how a batch is cut" in noise
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("plan", PLANS)
def test_cache_in_the_outputs_cannot_be_used(plan):
    for errors, fields in on_workers(unusual_calls.errors_of_caches, PLANS[plan]):
        assert all("keeps no cache" in error for error in errors), errors
        assert all(whole == sharded for whole, sharded in fields), fields


def test_wrappers_around_a_sharded_model_are_refused():
    for errors, is_compiled_version in on_workers(unusual_calls.errors_of_wrappers, PLANS["tp2"]):
        assert all("made of a model that is sharded over workers" in error for error in errors), errors
        assert is_compiled_version


class Model(nn.Linear):
    def forward(self, x):
        check_functional_call()
        return super().forward(x)


@pytest.mark.parametrize(
    "functional_call",
    [
        torch.func.functional_call,
        pytest.param(
            torch.nn.utils.stateless.functional_call, marks=pytest.mark.filterwarnings("ignore::FutureWarning")
        ),
    ],
)
def test_functional_call_is_refused_before_sharding(functional_call):
    model, inputs = Model(2, 2), torch.ones(1, 2)
    model(inputs)
    with pytest.raises(OptionError, match="call the model itself first"):
        functional_call(model, dict(model.named_parameters()), (inputs,))


@pytest.mark.parametrize("plan", PLANS)
def test_calls_that_are_recomputed_or_watched_are_refused(plan):
    for (recomputed, in_backward, counted), losses in on_workers(unusual_calls.errors_of_recomputed_calls, PLANS[plan]):
        assert "called inside of torch.utils.checkpoint, which" in recomputed
        assert "use_reentrant=True" in in_backward
        assert "a dispatch mode (_FlopCounterMode)" in counted
        assert losses[1] == losses[0]


@pytest.mark.parametrize("plan", PLANS)
def test_graphs_from_before_the_model_was_sharded_are_refused(plan):
    for errors, are_gradients_unchanged in on_workers(unusual_calls.errors_of_earlier_graphs, PLANS[plan]):
        assert all("sharded them over workers since" in error for error in errors.values()), errors
        assert are_gradients_unchanged


@pytest.mark.parametrize("kind", ["number", "buffer", "list", "result"])
@pytest.mark.parametrize("plan", BY_STAGES_AND_ROWS)
def test_modules_that_count_their_calls_are_refused_on_every_worker(plan, kind):
    for error in on_workers(unusual_calls.error_of_counting, PLANS[plan], kind):
        assert "post_attention_layernorm changed a number, a list, a tensor or a buffer of its own" in error


@pytest.mark.parametrize("plan", BY_STAGES_AND_ROWS)
def test_modules_that_count_nothing_are_computed(plan):
    assert on_workers(unusual_calls.error_of_counting, PLANS[plan], "nothing") == [None, None]


@pytest.mark.parametrize("plan", PLANS)
def test_model_inside_a_wrapper_saves_itself(plan):
    for error, weight_difference in on_workers(unusual_calls.saved_from_inside_a_wrapper, PLANS[plan]):
        assert error == "AttributeError: 'DataParallel' object has no attribute 'save_pretrained'"
        assert weight_difference == 0
