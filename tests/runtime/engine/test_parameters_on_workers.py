"""Parameters, gradients and optimizers of a sharded model mean what they mean on one device."""

import pytest

from tests.helpers.models.families import PLANS as PLANS_OF_FOUR
from tests.helpers.sharded.model_changes import difference_with_own_module, errors_of_changes
from tests.helpers.sharded.pattern_differences import PATTERNS, differences
from tests.helpers.workers import WorkerError, run_on_workers

WHOLE, HALVES = {"stage_layers": (3,)}, {"micro_batches": 2, "micro_batch_size": 2}
PLANS = {
    "tp2": {**WHOLE, "tensor": 2, "micro_batch_size": 8},
    "pp2": {"stage_layers": (2, 1), "pipeline": 2, "micro_batches": 2, "micro_batch_size": 4},
    "dp2": {**WHOLE, **HALVES, "data": 2},
    "dp2-sharded": {**WHOLE, **HALVES, "data": 2, "sharding": "parameters"},
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern_sees_what_it_sees_on_one_device(pattern):
    """The comparison finds a wrong number and one that is none."""
    scales = 1.0, 1.001, float("nan")
    for same, *wrong in run_on_workers(differences, [("gpt2", PLANS["dp2"], pattern, scales)])[0]:
        assert same < 1e-9
        assert min(wrong) > 1e-4


# With the test above, each pattern meets each kind of parallelism: data, tensors with sharded data, stages of tensors.
@pytest.mark.parametrize(("family", "plan"), [("llama", "tp-sharded"), ("gpt2", "pp-tp")])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern_on_four_workers(pattern, family, plan):
    for (found,) in run_on_workers(differences, [(family, PLANS_OF_FOUR[plan], pattern)], size=4)[0]:
        assert found < 1e-9


@pytest.mark.parametrize("plan", ["pp2", "dp2", "dp2-sharded"])
def test_module_of_the_scripts_own_sees_whole_rows(plan):
    for found in run_on_workers(difference_with_own_module, [(PLANS[plan],)])[0]:
        assert found < 1e-9


def test_module_of_the_scripts_own_is_not_computed_with_tensor_parallelism():
    with pytest.raises(WorkerError, match="MeanOfRows, which is not part of transformers, and tensor parallelism"):
        run_on_workers(difference_with_own_module, [(PLANS["tp2"],)])


@pytest.mark.parametrize("plan", ["tp2", "pp2", "dp2-sharded"])
def test_copies_and_changes_of_a_sharded_model_are_refused(plan):
    for errors in run_on_workers(errors_of_changes, [(PLANS[plan],)])[0]:
        assert "the parameter model.scale was put into" in errors["add_parameter"]
        assert "lm_head was replaced in the model after it was sharded" in errors["replace_module"]
        assert "the forward pass of model.layers.0 was replaced" in errors["replace_forward"]
        assert "the parameter lm_head.weight was put into" in errors["tie"]
        assert "set it in model.config before the first training step" in errors["see_later_tokens"]
        assert "an embedding with max_norm=1.0" in errors["renormalize"]
        assert (errors["fewer layers"] is None) == (plan != "pp2")
        assert "memory with parts of lm_head.weight" in errors["view"]
        assert "make the view again after that batch" in errors["flat parameter"]
        assert "copy it before its first training step" in errors["copy"]
        assert "copy it before its first training step" in errors["average"]
        assert "model.save_pretrained(directory)" in errors["save"]
        assert "no worker has all of it" in errors["memory"]
        assert "keep their shape" in errors["shape"]
        assert "create_graph=True" in errors["second order"]
