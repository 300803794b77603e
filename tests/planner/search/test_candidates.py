"""The candidates of a search: all can be run, all satisfy the constraints, and an error says why there are none."""

import pytest

from moreh.errors import PlanError
from moreh.planner.optimizer_state import optimizer_state
from moreh.planner.plan.plan import Training
from moreh.planner.plan.plan_table import SHARD_NONE
from moreh.planner.plan.schedules import check_schedule
from moreh.planner.search.candidates import candidate_tables
from moreh.planner.search.constraints import Constraints
from moreh.planner.search.search import search
from tests.helpers.planner.cases import GPT, LLAMA, environment_of


def test_all_candidates_can_be_run():
    training = Training(LLAMA, 24, 512)
    environment = environment_of("MI250 GCD", 8)
    plans = [
        table.plan(row)
        for table in candidate_tables(environment.roofline, environment.cluster, training, Constraints(max_context=2))
        for row in range(len(table))
    ]
    assert len(set(plans)) == len(plans)
    for plan in plans:
        assert plan.devices == 8
        assert plan.global_batch_size == 24
        assert sum(plan.stage_layers) == 8
        assert min(plan.stage_layers) >= 1
        assert len(plan.stage_layers) == plan.pipeline * plan.chunks
        assert 4 % plan.tensor == 0  # key-value heads
        check_schedule(plan.schedule, plan.pipeline, plan.micro_batches, plan.chunks)
        assert not (plan.schedule in ("zero-bubble", "zbv") and plan.sharding != "none")
        assert not (plan.sequence_parallel and plan.tensor == 1)
        assert not (plan.sharding != "none" and plan.data * plan.context == 1)
    values = {name: {getattr(plan, name) for plan in plans} for name in plans[0].__dataclass_fields__}
    assert values["schedule"] == {"1f1b", "interleaved", "zero-bubble", "zbv"}
    assert values["recomputation"] == {"none", "selective", "full"}
    assert values["sharding"] == {"none", "optimizer", "gradients", "parameters"}
    assert values["context"] == {1, 2}
    assert any(max(plan.stage_layers) - min(plan.stage_layers) > 0 for plan in plans)  # uneven stages


@pytest.mark.parametrize(
    ("constraints", "is_satisfied"),
    [
        (Constraints(pipeline=4), lambda plan: plan.pipeline == 4),
        (Constraints(micro_batches=2), lambda plan: plan.micro_batches == 2),
        (Constraints(recompute=True), lambda plan: plan.recomputation != "none"),
        (Constraints(recompute=False), lambda plan: plan.recomputation == "none"),
        (Constraints(shard_parameters=True), lambda plan: plan.sharding == "parameters"),
        (Constraints(shard_parameters=False), lambda plan: plan.sharding != "parameters"),
        (Constraints(max_tensor=1), lambda plan: plan.tensor == 1),
        (Constraints(sequence_parallel=True), lambda plan: plan.sequence_parallel),
        (Constraints(sequence_parallel=False), lambda plan: not plan.sequence_parallel),
        (Constraints(schedules=("1f1b",)), lambda plan: plan.schedule == "1f1b"),
    ],
)
def test_best_plans_satisfy_the_constraints(constraints, is_satisfied):
    environment = environment_of("MI250 GCD", 8)
    result = search(Training(LLAMA, 16, 512), environment, constraints, count=50)
    assert result.best
    assert all(is_satisfied(best.plan) for best in result.best)
    assert result.candidates < search(Training(LLAMA, 16, 512), environment).candidates


def test_batches_and_stages_that_cannot_be_split_are_refused():
    environment = environment_of("MI250 GCD", 7)
    with pytest.raises(PlanError, match="no plan divides a batch of 5 x 64 over 7 devices"):
        search(Training(GPT, 5, 64), environment)
    with pytest.raises(PlanError, match="3 stages: the number must divide 7 devices"):
        search(Training(GPT, 7, 64), environment, Constraints(pipeline=3))
    with pytest.raises(PlanError, match="both numbers must be at least 1"):
        search(Training(GPT, 0, 64), environment)


def test_micro_batches_stay_below_the_limit_of_tokens_where_there_is_no_pipeline():
    training = Training(LLAMA, 24, 512)
    environment = environment_of("MI250 GCD", 8)

    def sizes(constraints):
        tables = candidate_tables(environment.roofline, environment.cluster, training, constraints)
        plans = [table.plan(row) for table in tables for row in range(len(table))]
        return {
            is_pipeline: {p.micro_batch_size for p in plans if (p.pipeline > 1) == is_pipeline}
            for is_pipeline in (0, 1)
        }

    limited = sizes(Constraints(max_micro_batch_tokens=1024 + 511))
    assert max(limited[0]) == 2
    assert limited[1] == sizes(Constraints())[1]
    # One sequence is not cut.
    assert sizes(Constraints(max_micro_batch_tokens=100))[0] == {1}


def test_plans_for_adafactor_split_no_matrix():
    training = Training(LLAMA, 16, 512, optimizer_state("adafactor", {}))
    environment = environment_of("MI250 GCD", 8)
    tables = list(candidate_tables(environment.roofline, environment.cluster, training, Constraints()))
    assert sum(map(len, tables)) > 10
    assert all((table.tensor == 1).all() and (table.sharding == SHARD_NONE).all() for table in tables)
    with pytest.raises(PlanError, match="adafactor needs whole matrices: choose another optimizer, or give fewer"):
        search(training, environment, Constraints(shard_parameters=True), count=1)
