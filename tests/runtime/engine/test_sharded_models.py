"""A script's own loop on a model that is sharded over workers: it means what it means on one device."""

import pytest

from tests.helpers.batches import PREFIX_LEN, long_batch
from tests.helpers.models.families import PP_TP
from tests.helpers.plans.cases import plan_of
from tests.helpers.sharded import afterwards, cases, loop
from tests.helpers.workers import run_on_workers

PP_SHARDED = {
    "stage_layers": (2, 1),
    "pipeline": 2,
    "data": 2,
    "micro_batches": 2,
    "micro_batch_size": 2,
    "sharding": "parameters",
}
TP_SHARDED = {
    "stage_layers": (3,),
    "tensor": 2,
    "data": 2,
    "micro_batches": 2,
    "micro_batch_size": 2,
    "sharding": "parameters",
}
SEQUENCE = {"stage_layers": (3,), "tensor": 4, "micro_batch_size": 8, "sequence_parallel": True}
PLANS = {"pp-tp": PP_TP, "pp-sharded": PP_SHARDED, "tp-sharded": TP_SHARDED, "sequence": SEQUENCE}


def on_workers(function, *arguments):
    """The results of the four ranks."""
    return run_on_workers(function, [arguments], size=4)[0]


def compare(family, plan, changes):
    """On each rank: `cases.compare` with changes of the training, all of which can be pickled."""
    return cases.compare(family, plan, **changes)


def assert_equal_on_all_ranks(family, plan, **changes):
    for curve_difference, weight_difference in on_workers(compare, family, PLANS[plan], changes):
        assert curve_difference < 1e-9
        assert weight_difference < 1e-9


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_training_is_that_of_a_whole_model(family, plan):
    assert_equal_on_all_ranks(family, plan)


@pytest.mark.parametrize(
    ("family", "settings", "plan"),
    [("llama", {"max_position_embeddings": 96}, "tp-sharded"), ("gpt2", {"n_positions": 96}, "pp-tp")],
)
def test_training_on_long_rows_with_the_position_multiple_of_production(family, settings, plan):
    assert_equal_on_all_ranks(family, plan, settings=settings, positions_multiple=64, make_batch=long_batch, steps=2)


@pytest.mark.parametrize("plan", PLANS)
def test_comparison_finds_a_gradient_that_is_not_a_number(plan):
    for curve_difference, weight_difference in on_workers(compare, "llama", PLANS[plan], {"fault": "not-a-number"}):
        assert curve_difference == weight_difference == float("inf")


@pytest.mark.parametrize("plan", PLANS)
def test_shared_prefix_is_computed_once(plan):
    """One token more than the rows share would be found."""
    results = on_workers(cases.compare_with_shared_prefix, "llama", PLANS[plan])
    for curve_difference, weight_difference, prefix_lens in results:
        assert max(curve_difference, weight_difference) < 1e-9
        assert prefix_lens == {PREFIX_LEN}
    results = on_workers(cases.compare_with_shared_prefix, "llama", PLANS[plan], PREFIX_LEN + 1)
    for curve_difference, weight_difference, _ in results:
        assert min(curve_difference, weight_difference) > 1e-6


# The optimizers work on each element alone, so that what a plan does to the elements is the same to all of them.
@pytest.mark.parametrize(
    ("optimizer", "plan"),
    [(loop.sgd_with_momentum, "pp-tp"), (loop.two_groups, "tp-sharded"), (loop.fused_adamw, "pp-sharded")],
)
def test_optimizers_of_single_elements(optimizer, plan):
    assert_equal_on_all_ranks("llama", plan, make_optimizer=optimizer)


@pytest.mark.parametrize("plan", ["pp-tp", "tp-sharded"])
def test_optimizer_of_whole_matrices_sees_whole_matrices(plan):
    assert_equal_on_all_ranks("llama", plan, make_optimizer=loop.Layerwise)


@pytest.mark.parametrize(
    ("clip", "plan"),
    [(loop.clip_listed, "pp-tp"), (loop.clip_largest, "pp-sharded"), (loop.clip_output_layer, "pp-tp")],
)
def test_gradients_are_clipped_by_the_norm_over_all_ranks(clip, plan):
    assert_equal_on_all_ranks("llama", plan, clip=clip)


@pytest.mark.parametrize("plan", ["pp-tp", "tp-sharded"])
def test_frozen_parameters_keep_their_weights(plan):
    assert_equal_on_all_ranks("llama", plan, change=loop.freeze_some)


@pytest.mark.parametrize("plan", PLANS)
def test_loss_can_be_scaled_summed_and_left_unused(plan):
    for difference, error_of_second_use in on_workers(cases.backward_variants, "gpt2", PLANS[plan]):
        assert difference < 1e-9
        assert "second time" in error_of_second_use


# Each plan once, each family twice.
@pytest.mark.parametrize(
    ("family", "plan"), [("gpt2", "pp-tp"), ("gpt2", "tp-sharded"), ("llama", "pp-sharded"), ("llama", "sequence")]
)
def test_logits_evaluation_and_generation_are_those_of_a_whole_model(family, plan):
    for difference, same_tokens, training in on_workers(cases.outputs_without_gradients, family, PLANS[plan]):
        assert difference < 1e-9
        assert same_tokens
        assert not training


def test_comparisons_of_weights_and_logits_find_a_nan_on_the_last_rank():
    weight_differences = [result[0] for result in on_workers(cases.backward_variants, "gpt2", PP_TP, 3)]
    assert weight_differences == [float("inf")] * 4
    logit_differences = [result[0] for result in on_workers(cases.outputs_without_gradients, "gpt2", PP_TP, 3)]
    assert logit_differences[3] == float("inf")
    assert max(logit_differences[:3]) < 1e-9


@pytest.mark.parametrize("plan", ["pp-tp", "tp-sharded"])
def test_calls_that_a_sharded_model_cannot_answer_are_refused(plan):
    for errors in on_workers(cases.refusals, PLANS[plan]):
        assert "output_hidden_states=True" in errors["hidden states"]
        assert "call the whole model" in errors["part"]
        assert "WorkerError: the workers were given different batches" in errors["batches"]
        assert "give input_ids" in errors["nothing"]
        assert "save the model with model.save_pretrained(directory)" in errors["safetensors"]
        assert "leave assign out" in errors["assign"]
        assert "the weights that are saved are the model's own" in errors["other weights"]
        assert "leave it out" in errors["cache"]
        assert "AdamW" in errors["adafactor"]
        assert "AdamW" in errors["lbfgs"]
        assert "the only label that is ignored is -100" in errors["ignored label"]
        assert "with the active adapters" in errors["adapters of rows"]
        assert "attention_mask is (2, 12): expected a tensor with a row for each of the 8" in errors["mask"]
        assert "IndexError: Target -1 is out of bounds" in errors["no token"]
        assert "use bfloat16" in errors["float16"]
        assert "a forward hook on the whole model" in errors["hook"]


def test_hooks_on_gradients_are_refused():
    for errors in on_workers(cases.gradient_hook_errors, PP_TP):
        assert all("hooks on gradients are lost at the first step" in error for error in errors)


def test_loss_of_a_router_is_refused():
    for error in on_workers(_router_loss_error, "mixtral", PP_SHARDED):
        assert "output_router_logits=True" in error


def _router_loss_error(family, plan):
    return cases.sharding_error(family, plan, output_router_logits=True)


def test_models_that_compute_more_are_refused():
    pytest.importorskip("peft")
    for own_forward, learned_prompts in on_workers(cases.errors_of_other_computations, PP_TP):
        assert "OwnForward has a forward pass of its own (tests.helpers.sharded.cases)" in own_forward
        assert "learned prompts of PEFT, which is not computed on several workers" in learned_prompts


@pytest.mark.parametrize("plan", ["pp-tp", "pp-sharded"])
def test_parameters_frozen_after_sharding_get_no_gradient(plan):
    assert on_workers(cases.gradients_after_freezing, PLANS[plan]) == [1, 1, 1, 1]


@pytest.mark.parametrize("frees_buffers", [True, False])
def test_pipeline_has_buffers_only_for_micro_batches_on_their_way(frees_buffers):
    """And not for each of eight micro-batches, in each of two shapes."""
    plan = plan_of("llama", "pp4 mb1x8", workers=4)
    results = on_workers(cases.received_at_once, "llama", plan, frees_buffers)
    for rank, (received, most, lengths) in enumerate(results):
        assert received == 2 * 8 * (2 if 0 < rank < 3 else 1)
        assert len(lengths) == 2
        # Hidden states of as many micro-batches as stages follow, one gradient, and what torch's loop still refers to.
        assert (most <= 4 - rank + 2) == frees_buffers


def test_ranks_that_share_rows_draw_the_same_random_numbers():
    """Others draw different ones, and the script's generator stays in step."""
    draws_by_place = {}
    next_of_script = set()
    for draws, drawn_afterwards, (pipeline, data, _) in on_workers(cases.dropout_draws, TP_SHARDED):
        draws_by_place.setdefault((pipeline, data), set()).add(tuple(draws))
        next_of_script.add(drawn_afterwards)
        assert draws[0] != draws[1]
    assert len(next_of_script) == 1
    assert [len(draws) for draws in draws_by_place.values()] == [1, 1]
    assert len(set.union(*draws_by_place.values())) == 2


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_sharded_model_stays_where_it_is_and_keeps_its_dtype(plan):
    for errors, is_same in on_workers(afterwards.moves, plan):
        assert is_same
        assert [name for name, error in errors.items() if error is not None] == [
            "half", "bfloat16", "part in float", "meta"
        ]  # fmt: skip
        assert "was cast from torch.float64 to torch.bfloat16: cast it before" in errors["bfloat16"]
        assert "moved to the meta device" in errors["meta"]


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_script_draws_afterwards_what_it_draws_with_a_whole_model(plan):
    for whole, sharded in on_workers(afterwards.drawn_after_training, "llama", plan):
        assert sharded == whole


def test_training_with_dropout_is_reproducible():
    for first, again, other_seed in on_workers(cases.dropout_loss, PP_SHARDED):
        assert first == again != other_seed
