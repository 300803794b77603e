"""Compares what scripts do with a sharded model's parameters with the same on a whole one."""

import copy

import torch

from moreh.planner.plan.plan import Plan
from moreh.runtime.engine.sharded.install import install_sharding_support
from moreh.runtime.engine.sharded.shard_model import shard_model
from tests.helpers.batches import batch, label_positions_rounded_to
from tests.helpers.compare import max_difference, relative_difference, worst
from tests.helpers.float64 import exact_float64
from tests.helpers.models.families import make_model
from tests.helpers.sharded import gradient_patterns, parameter_patterns, state_patterns

PATTERNS = {
    function.__name__: function
    for function in (
        parameter_patterns.clip_by_hand,
        parameter_patterns.reductions,
        parameter_patterns.not_a_number,
        parameter_patterns.matrices,
        parameter_patterns.text_of_parameters,
        parameter_patterns.data_assigned,
        parameter_patterns.data_swapped_and_restored,
        parameter_patterns.vector_to_parameters,
        parameter_patterns.average_by_hand,
        parameter_patterns.penalty_to_the_start,
        gradient_patterns.masks_and_noise,
        gradient_patterns.rows_masked_in_a_hook,
        gradient_patterns.gradients_of_some_inputs,
        gradient_patterns.clip_with_others,
        gradient_patterns.unfrozen_later,
        gradient_patterns.saved_by_hand,
        gradient_patterns.foreach_optimizers,
        gradient_patterns.gradients_assigned,
        gradient_patterns.embeddings_of_a_projector,
        gradient_patterns.gradients_from_before_the_first_labelled_call,
        gradient_patterns.attributes_from_before_the_first_step,
        state_patterns.state_saved,
        state_patterns.state_loaded,
        state_patterns.aliases_from_before_the_first_step,
    )
}


def differences(family, plan, pattern, scales=(1.0,)):
    """On each rank: the largest difference of what a pattern sees on a sharded model, for factors that falsify it."""
    install_sharding_support()
    whole = make_model(family)
    if "gradients_from_before" in pattern:
        ids = batch(5, whole.config.vocab_size)[0]
        torch.nn.functional.cross_entropy(whole(input_ids=ids).logits.flatten(0, 1), ids.flatten()).backward()
    sharded = copy.deepcopy(whole)
    for parameter, copied in zip(whole.parameters(), sharded.parameters(), strict=True):
        copied.grad = None if parameter.grad is None else parameter.grad.clone()
    for model in (whole, sharded):
        for number, parameter in enumerate(model.parameters()):
            parameter.mark = 1.5 + number
        model.__dict__["numbers"] = {parameter: number for number, parameter in enumerate(model.parameters())}
        state_patterns.keep_aliases(model)
    shard_model(sharded, Plan(**plan))
    with exact_float64(), label_positions_rounded_to(4):
        expected, actual = PATTERNS[pattern](whole), PATTERNS[pattern](sharded)
    assert len(expected) == len(actual)
    return [worst(_difference(a, b, scale) for a, b in zip(actual, expected, strict=True)) for scale in scales]


def _difference(actual, expected, scale):
    if isinstance(actual, torch.Tensor) and actual.dim():
        return max_difference(actual.detach() * scale, expected.detach())
    return relative_difference(float(actual) * scale, float(expected), floor=1e-3)
