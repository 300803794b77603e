"""Losses that a script makes of logits train a sharded model as they train a whole one."""

import pytest

from tests.helpers.models.families import PP_TP
from tests.helpers.plans.cases import plan_of
from tests.helpers.sharded import own_losses
from tests.helpers.workers import run_on_workers

PLANS = {
    "pp-tp": PP_TP,
    "pp-sharded": {
        "stage_layers": (2, 1),
        "pipeline": 2,
        "data": 2,
        "micro_batches": 2,
        "micro_batch_size": 2,
        "sharding": "parameters",
    },
    "tp-sharded": {"stage_layers": (3,), "tensor": 2, "data": 2, "micro_batch_size": 2, "sharding": "parameters"},
    "dp": {"stage_layers": (3,), "data": 4, "micro_batch_size": 2},
    "dp-optimizer": {"stage_layers": (3,), "data": 4, "micro_batch_size": 1, "sharding": "optimizer"},
    "tp-sequence": {
        "stage_layers": (3,),
        "tensor": 4,
        "micro_batch_size": 8,
        "sequence_parallel": True,
        "recomputation": "full",
    },
}


def on_workers(function, *arguments):
    """The results of the four ranks."""
    return run_on_workers(function, [arguments], size=4)[0]


@pytest.mark.parametrize(
    ("loss", "plan"), [(("distillation", "dpo")[number % 2], plan) for number, plan in enumerate(PLANS)]
)
def test_training_is_that_of_a_whole_model(loss, plan):
    for curve_difference, weight_difference in on_workers(own_losses.compare, loss, "llama", PLANS[plan]):
        assert max(curve_difference, weight_difference) < 1e-9


# The test above has a Llama under every plan.
@pytest.mark.parametrize(
    ("family", "plan", "loss"),
    [("gpt2", "pp-tp", loss) for loss in own_losses.LOSSES]
    + [("llama", "tp-sequence", loss) for loss in own_losses.LOSSES if loss != "dpo"],
)
def test_every_loss(family, plan, loss):
    for curve_difference, weight_difference in on_workers(own_losses.compare, loss, family, PLANS[plan]):
        assert max(curve_difference, weight_difference) < 1e-9


@pytest.mark.parametrize("plan", ["pp-tp", "pp-sharded", "dp"])
def test_logits_have_the_dtype_of_autocast(plan):
    for differences in on_workers(own_losses.logits_in_autocast, "llama", PLANS[plan]):
        assert max(differences) < 0.03


@pytest.mark.parametrize("plan", ["pp-tp", "dp"])
def test_comparison_finds_gradients_of_other_tokens(plan):
    results = on_workers(own_losses.compare_with_wrong_part, "weighted_tokens", "llama", PLANS[plan])
    for _, weight_difference in results:
        assert weight_difference > 1e-6


@pytest.mark.parametrize("plan", ["pp-tp", "pp-sharded", "tp-sequence"])
def test_both_passes_have_the_same_dropout(plan):
    """The derivative of the loss along its gradient is the squared norm of the gradient."""
    assert max(on_workers(own_losses.dropout_of_both_passes, "gpt2", PLANS[plan])) < 1e-4


def test_memory_that_the_backward_passes_free_is_kept():
    assert on_workers(own_losses.steps_that_keep_memory, PP_TP) == [[0, 1]] * 4


def test_what_cannot_be_done_is_said():
    for said in on_workers(own_losses.what_is_said, PP_TP):
        assert "backward through the graph a second time" in said["twice"]
        assert "modified by an inplace operation" in said["backward after a step"]
        assert "once_differentiable" in said["create_graph"]
        assert "inputs with gradients" in said["soft prompt"]
        assert said["class"] == "CausalLMOutputWithPast"


def test_graphs_can_be_retained():
    for ratio in on_workers(own_losses.retained, PP_TP):
        assert ratio == pytest.approx(2)


@pytest.mark.parametrize(
    "notation",
    [
        "pp4 mb2x4 zero-bubble:2",
        "pp4 mb2x4 interleaved:2",
        "pp2 tp2 mb4x2 zbv",
        "pp2 dp2 mb2x2 interleaved:2 shard:parameters",
    ],
)
def test_schedules_with_several_stages_on_a_rank(notation):
    plan = plan_of("llama", notation, 4)
    for curve_difference, weight_difference in on_workers(own_losses.compare_deep, "distillation", plan):
        assert max(curve_difference, weight_difference) < 1e-9


def test_evaluation_before_the_training_has_logits():
    for differences in on_workers(own_losses.unsharded_evaluation, 4):
        assert max(differences) < 1e-9
