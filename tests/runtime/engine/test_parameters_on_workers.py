"""Parameters, gradients and optimizers of a sharded model mean what they mean on one device."""

import pytest

from tests.helpers.models.families import PLANS as PLANS_OF_FOUR
from tests.helpers.sharded.parameter_patterns import PATTERNS, difference
from tests.helpers.workers import run_on_workers

WHOLE, HALVES = {"stage_layers": (3,)}, {"micro_batches": 2, "micro_batch_size": 2}
PLANS = {
    "tp2": {**WHOLE, "tensor": 2, "micro_batch_size": 8},
    "pp2": {"stage_layers": (2, 1), "pipeline": 2, "micro_batches": 2, "micro_batch_size": 4},
    "dp2": {**WHOLE, **HALVES, "data": 2},
    "dp2-sharded": {**WHOLE, **HALVES, "data": 2, "sharding": "parameters"},
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern_sees_what_it_sees_on_one_device(pattern, plan):
    for found in run_on_workers(difference, [("gpt2", PLANS[plan], pattern)])[0]:
        assert found < 1e-9


@pytest.mark.parametrize("plan", ["tp-sharded", "pp-tp"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern_on_four_workers(pattern, plan):
    for found in run_on_workers(difference, [("llama", PLANS_OF_FOUR[plan], pattern)], size=4)[0]:
        assert found < 1e-9


@pytest.mark.parametrize("pattern", PATTERNS)
def test_comparison_of_patterns_finds_a_wrong_number(pattern):
    for scale in (1.001, float("nan")):
        for found in run_on_workers(difference, [("gpt2", PLANS["dp2"], pattern, scale)])[0]:
            assert found > 1e-4
