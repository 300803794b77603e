"""A fixed sample of `make verify-plans`, on four processes: any two traits that go together in some plan, in two steps.

Beware of passing vacuously: the comparison must find known faults.
"""

import re

import pytest

from moreh.planner.plan.notation import plan_text
from tests.helpers.plans.cases import all_plans, covering_plans, plan_of
from tests.helpers.plans.runs import verify

WORKERS = 4
STEPS = 2
CASES = covering_plans(("gpt2", "llama"), WORKERS)


def test_sample_has_every_kind():
    plans = [plan for _, plan in CASES]
    assert len(plans) < 40
    for name in ("tensor", "pipeline", "data", "schedule", "recomputation", "sharding", "sequence_parallel"):
        assert {getattr(plan, name) for plan in plans} == {
            getattr(plan, name) for family in ("gpt2", "llama") for plan in all_plans(family, WORKERS)
        }


@pytest.mark.parametrize(
    ("family", "plan"), CASES, ids=lambda value: value if isinstance(value, str) else plan_text(value)
)
def test_plan(family, plan):
    verdict = verify(family, plan, steps=STEPS)
    assert not verdict.problems, verdict.text


FAULTS = {
    "no-tied-sum": ("gpt2", "pp4 mb2x4", "gradients"),
    "no-data-reduction": ("llama", "pp2 dp2 mb2x2", "replicas"),
    "partial-gradient": ("llama", "tp2 dp2 mb4x1 sp", "gradients"),
    "mean-of-means": ("llama", "tp2 dp2 mb2x2", "losses"),
    "stale-weights": ("llama", "pp2 dp2 mb2x2 shard:optimizer", "losses"),
    "ignored-scale": ("gpt2", "dp4 mb2x1", "norms"),
    "lost-accumulation": ("gpt2", "tp2 pp2 mb2x4", "gradients"),
    "norm-of-own-part": ("llama", "dp4 mb2x1 shard:parameters", "norms"),
    "old-parameters": ("gpt2", "tp2 dp2 mb2x2", "weights"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(fault):
    family, text, kind = FAULTS[fault]
    verdict = verify(family, plan_of(family, text, WORKERS), fault, STEPS)
    assert verdict.differences is not None, verdict.problems
    assert any(problem.startswith(kind) for problem in verdict.problems)


def test_plan_without_end_is_named_and_the_next_one_runs():
    plan = plan_of("gpt2", "pp2 mb4x2", workers=2)
    (problem,) = verify("gpt2", plan, "no-end", STEPS, timeout=2).problems
    assert re.search(r"pipeline=2.*no answer from ranks \[0, 1\] after 2 s", problem, re.DOTALL)
    assert not verify("gpt2", plan, steps=STEPS).problems
