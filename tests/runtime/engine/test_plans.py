"""A fixed sample of `make verify-plans`, on four processes: any two traits that go together in some plan, in two steps.

A comparison could pass vacuously, so each must find known faults.
"""

import re
from dataclasses import replace

import numpy as np
import pytest

from moreh.planner.plan.notation import plan_text
from tests.helpers.plans import runs
from tests.helpers.plans.cases import all_plans, covering_plans, plan_of
from tests.helpers.plans.runs import verify
from tests.helpers.plans.training import reference
from tests.helpers.workers import run_on_workers

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
def test_training_under_plan_is_that_of_one_process(family, plan):
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
    "not-a-number": ("gpt2", "tp2 pp2 mb2x4", "norms"),
    "old-parameters": ("gpt2", "tp2 dp2 mb2x2", "weights"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(fault):
    family, text, kind = FAULTS[fault]
    verdict = verify(family, plan_of(family, text, WORKERS), fault, STEPS)
    assert verdict.differences is not None, verdict.problems
    assert any(problem.startswith(kind) for problem in verdict.problems)


@pytest.fixture(scope="module")
def results():
    """The ranks' results under a plan in which each matrix is held twice, and the reference."""
    plan = plan_of("llama", "tp2 dp2 mb4x1", WORKERS)
    run_on_workers(runs.get_ready, [("llama",)], size=WORKERS, timeout=runs.START_TIMEOUT_S)
    (ranks,) = run_on_workers(runs.train_with_plan, [("llama", plan, None, STEPS, "built-in")], size=WORKERS)
    return ranks, reference("llama", STEPS)


def changed(rank, kind):
    """The results of a rank with a NaN in one of their parts."""
    curves, shards = rank.curves, dict(rank.shards)
    name = list(shards)[-1]
    if kind in ("losses", "norms"):
        return replace(rank, curves=replace(curves, **{kind: [*getattr(curves, kind)[:-1], np.nan]}))
    if kind == "evaluation":
        return replace(rank, curves=replace(curves, evaluation=np.nan))
    if kind == "logits":
        return replace(rank, curves=replace(curves, logits=with_nan(curves.logits)))
    part = "gradient" if kind == "gradients" else "weight"
    shards[name] = replace(shards[name], **{part: with_nan(getattr(shards[name], part))})
    return replace(rank, shards=shards)


def with_nan(array):
    array = array.copy()
    array.flat[-1] = np.nan
    return array


@pytest.mark.parametrize("rank", [0, WORKERS - 1])
@pytest.mark.parametrize("kind", ["losses", "norms", "evaluation", "logits", "gradients", "weights"])
def test_nan_in_one_number_of_one_rank_is_found(results, kind, rank):
    ranks, expected = results
    assert not runs.compare(ranks, expected, STEPS)[1]
    differences, problems = runs.compare(
        [changed(result, kind) if index == rank else result for index, result in enumerate(ranks)], expected, STEPS
    )
    assert differences.worst == np.inf
    # The last rank's matrices are those of another rank, too.
    kinds = (kind, "replicas") if kind in ("gradients", "weights") else (kind,)
    assert problems
    assert all(problem.startswith(kinds) for problem in problems)


def test_plan_without_end_is_named_and_the_next_one_runs():
    plan = plan_of("gpt2", "pp2 mb4x2", workers=2)
    (problem,) = verify("gpt2", plan, "no-end", STEPS, timeout=2).problems
    assert re.search(r"pipeline=2.*no answer from ranks \[0, 1\] after 2 s", problem, re.DOTALL)
    assert not verify("gpt2", plan, steps=STEPS).problems
