"""A script's own loop on a model that is divided over workers: it means what it means on one device."""

import pytest

from tests.helpers import sharded_cases as cases
from tests.helpers.plan_cases import plan_of
from tests.helpers.workers import run_on_workers

PP_TP = {"stage_layers": (1, 2), "pipeline": 2, "tensor": 2, "micro_batches": 2, "micro_batch_size": 4}
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


def assert_equal(results, tolerance=1e-9):
    for seen, weights in results:
        assert seen < tolerance
        assert weights < tolerance


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_loop(family, plan):
    assert_equal(on_workers(cases.compare, family, PLANS[plan]))


@pytest.mark.parametrize("plan", PLANS)
def test_rows_that_begin_alike(plan):
    """What they have in common is computed once; one token more would be found."""
    for losses, weights, shared in on_workers(cases.compare_rows_that_begin_alike, "llama", PLANS[plan]):
        assert max(losses, weights) < 1e-9
        assert shared == {5}
    for losses, weights, _ in on_workers(cases.compare_rows_that_begin_alike, "llama", PLANS[plan], 6):
        assert min(losses, weights) > 1e-6


@pytest.mark.parametrize("plan", ["pp-tp", "tp-sharded"])
@pytest.mark.parametrize("optimizer", [cases.sgd_with_momentum, cases.two_groups, cases.fused_adamw])
def test_optimizers(optimizer, plan):
    assert_equal(run_on_workers(_compare_with_optimizer, [(PLANS[plan], optimizer)], size=4)[0])


def _compare_with_optimizer(plan, optimizer):
    return cases.compare("llama", plan, optimizer_of=optimizer)


@pytest.mark.parametrize("plan", ["pp-tp", "tp-sharded"])
def test_optimizer_of_whole_matrices(plan):
    """Its norms are those of the whole matrices."""
    assert_equal(run_on_workers(_compare_with_optimizer, [(PLANS[plan], cases.Layerwise)], size=4)[0])


@pytest.mark.parametrize("plan", ["pp-tp", "pp-sharded"])
@pytest.mark.parametrize("clip", [cases.clip_listed, cases.clip_largest, cases.clip_output_layer])
def test_clipping(clip, plan):
    assert_equal(run_on_workers(_compare_with_clipping, [(PLANS[plan], clip)], size=4)[0])


def _compare_with_clipping(plan, clip):
    return cases.compare("llama", plan, clip=clip)


@pytest.mark.parametrize("plan", ["pp-tp", "tp-sharded"])
def test_frozen_parameters(plan):
    assert_equal(run_on_workers(_compare_frozen, [(PLANS[plan],)], size=4)[0])


def _compare_frozen(plan):
    return cases.compare("llama", plan, change=cases.freeze_some)


@pytest.mark.parametrize("plan", PLANS)
def test_what_scripts_do_with_a_loss(plan):
    for difference, twice in on_workers(cases.backward_variants, "gpt2", PLANS[plan]):
        assert difference < 1e-9
        assert "second time" in twice


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logits_evaluation_and_generation(family, plan):
    for difference, same_text, training in on_workers(cases.outputs_without_labels, family, PLANS[plan]):
        assert difference < 1e-9
        assert same_text
        assert not training


@pytest.mark.parametrize("plan", ["pp-tp", "tp-sharded"])
def test_refusals(plan):
    for told in on_workers(cases.refusals, PLANS[plan]):
        assert "pass labels" in told["no labels"]
        assert "call it without labels" in told["logits"]
        assert "output_hidden_states=True" in told["hidden states"]
        assert "call the whole model" in told["part"]
        assert "WorkerError: the workers were given different batches" in told["batches"]
        assert "give input_ids" in told["nothing"]
        assert "save_pretrained" in told["pickle"]
        assert "leave it out" in told["cache"]
        assert "AdamW" in told["adafactor"]
        assert "AdamW" in told["lbfgs"]
        assert "the label that counts for nothing is -100" in told["ignored label"]
        assert "with the active adapters" in told["adapters of rows"]
        assert "attention_mask is (2, 12): allowed is a tensor with a row for each of the 8" in told["mask"]
        assert "IndexError: Target -1 is out of bounds" in told["no token"]
        assert "use bfloat16" in told["float16"]
        assert "a forward hook on the whole model" in told["hook"]


def test_hooks_on_gradients_are_refused():
    for error in on_workers(cases.gradient_hook_error, PP_TP):
        assert "hooks on gradients" in error


def test_loss_of_a_router_is_refused():
    arguments = ("mixtral", PP_SHARDED)
    for error in run_on_workers(_router_loss, [arguments], size=4)[0]:
        assert "output_router_logits=True" in error


def _router_loss(family, plan):
    return cases.division_error(family, plan, output_router_logits=True)


def test_other_computations_are_refused():
    pytest.importorskip("peft")
    for own_forward, learned_prompts in on_workers(cases.errors_of_other_computations, PP_TP):
        assert "OwnForward has a forward pass of its own (tests.helpers.sharded_cases)" in own_forward
        assert "learned prompts of PEFT, which is not computed on several workers" in learned_prompts


@pytest.mark.parametrize("plan", ["pp-tp", "pp-sharded"])
def test_parameters_frozen_after_the_division(plan):
    assert on_workers(cases.frozen_later, PLANS[plan]) == [1, 1, 1, 1]


@pytest.mark.parametrize("lets_go", [True, False])
def test_pipeline_has_room_for_what_is_on_its_way(lets_go):
    """And not for each of eight micro-batches, in each of two shapes."""
    plan = plan_of("llama", "pp4 mb1x8", workers=4)
    for rank, (received, most, lengths) in enumerate(on_workers(cases.received_at_once, "llama", plan, lets_go)):
        assert received == 2 * 8 * (2 if 0 < rank < 3 else 1)
        assert len(lengths) == 2
        # Hidden states of as many micro-batches as stages follow, the gradient of one, and what torch's loop still names.
        assert (most <= 4 - rank + 2) == lets_go


def test_random_numbers_of_ranks():
    """Ranks that share rows draw the same numbers, others different ones; the script's generator stays in step."""
    by_place = {}
    after = set()
    for draws, next_of_script, (pipeline, data, _) in on_workers(cases.dropout_draws, TP_SHARDED):
        by_place.setdefault((pipeline, data), set()).add(tuple(draws))
        after.add(next_of_script)
        assert draws[0] != draws[1]
    assert len(after) == 1
    assert [len(draws) for draws in by_place.values()] == [1, 1]
    assert len(set.union(*by_place.values())) == 2


def test_dropout_is_reproducible():
    for first, again, other in on_workers(cases.dropout_loss, PP_SHARDED):
        assert first == again != other
