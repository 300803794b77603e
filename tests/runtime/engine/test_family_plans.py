"""Models of many families under plans of each kind: losses, norms and weights are those of a whole model."""

import pytest

from tests.helpers.models.families import FAMILIES, NOT_TENSOR_PARALLEL, PLANS
from tests.helpers.sharded import cases
from tests.helpers.workers import run_on_workers


def assert_equal_on_all_ranks(family, plan):
    for curve_difference, weight_difference in run_on_workers(cases.compare, [(family, PLANS[plan])], size=4)[0]:
        assert curve_difference < 1e-9
        assert weight_difference < 1e-9


@pytest.mark.parametrize(("index", "family"), list(enumerate(FAMILIES)))
def test_training_is_that_of_a_whole_model(index, family):
    """Under one of the plans for each family, in turn; `make verify-families` runs all plans for all families."""
    assert_equal_on_all_ranks(family, list(PLANS)[index % len(PLANS)])


@pytest.mark.parametrize("family", NOT_TENSOR_PARALLEL)
def test_family_without_tensor_parallelism_is_refused_only_under_such_plans(family):
    assert_equal_on_all_ranks(family, "pp-sharded")
    for error in run_on_workers(cases.sharding_error, [(family, PLANS["tp-sharded"])], size=4)[0]:
        assert "tensor parallelism is not known to compute right" in error
