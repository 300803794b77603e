"""Models of many families under plans of each kind, beside a whole model: losses, norms and weights after some steps."""

import pytest

from tests.helpers import sharded_cases as cases
from tests.helpers.workers import run_on_workers

PP_TP = {"stage_layers": (1, 2), "pipeline": 2, "tensor": 2, "micro_batches": 2, "micro_batch_size": 4}
PLANS = {
    "pp-tp": PP_TP,
    "pp-tp-sequence": {**PP_TP, "sequence_parallel": True, "recomputation": "full"},
    "tp-sharded": {"stage_layers": (3,), "tensor": 2, "data": 2, "micro_batch_size": 4, "sharding": "parameters"},
    "pp-sharded": {
        "stage_layers": (2, 1),
        "pipeline": 2,
        "data": 2,
        "micro_batches": 2,
        "micro_batch_size": 2,
        "sharding": "parameters",
    },
}
# One of each kind of attention, of positions, of norms, of fused matrices, of output layers.
FAMILIES = (
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gpt_neox",
    "opt",
    "phi",
    "phi3",
    "falcon",
    "bloom",
    "gptj",
    "olmo2",
    "nanochat",
    "cohere",
    "starcoder2",
    "olmo",
)
# Families that there are no rules of tensor parallelism for.
NOT_TENSOR_PARALLEL = ("mixtral", "gpt_bigcode")


def check(family, plan):
    for seen, weights in run_on_workers(cases.compare, [(family, PLANS[plan])], size=4)[0]:
        assert seen < 1e-9
        assert weights < 1e-9


@pytest.mark.parametrize(("number", "family"), list(enumerate(FAMILIES)))
def test_family(number, family):
    """One of the plans for each family, in turn; `make verify-families` runs all plans for all families."""
    check(family, list(PLANS)[number % len(PLANS)])


@pytest.mark.parametrize("family", NOT_TENSOR_PARALLEL)
def test_family_without_tensor_parallelism(family):
    check(family, "pp-sharded")
    for error in run_on_workers(cases.division_error, [(family, PLANS["tp-sharded"])], size=4)[0]:
        assert "tensor parallelism is not known to compute right" in error
