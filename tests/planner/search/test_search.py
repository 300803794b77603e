"""The search: it leaves out no plan that could win, and its results change as they should with memory and links."""

from dataclasses import replace

import numpy as np
import pytest

from moreh.accelerator.flavors import find_flavor
from moreh.models.describe.from_source import describe
from moreh.planner.cost.memory.peak_memory import peak_memory
from moreh.planner.cost.pipeline_bounds import makespan_lower_bound
from moreh.planner.cost.prediction import predict, step_seconds
from moreh.planner.cost.stage_time import stage_time
from moreh.planner.hardware.cluster import cluster_for_flavor
from moreh.planner.hardware.environment import make_environment
from moreh.planner.plan.plan import Training
from moreh.planner.search.candidates import candidate_tables
from moreh.planner.search.constraints import Constraints
from moreh.planner.search.search import search
from tests.helpers.planner.cases import GPT, LLAMA, MODELS, MOE, environment_of, random_trainings, with_memory


def search_exhaustively(training, environment, constraints):
    """Every candidate that fits, simulated; (seconds, plan), fastest first."""
    plans = []
    limit = environment.cluster.device.memory_bytes * constraints.memory_fraction
    for table in candidate_tables(environment.roofline, environment.cluster, training, constraints):
        times = stage_time(environment.roofline, environment.cluster, table, training)
        fits = peak_memory(table, training, environment.software).total.max(axis=1) <= limit
        plans += [(step_seconds(table, row, times), table.plan(row)) for row in np.flatnonzero(fits)]
    return sorted(plans, key=lambda entry: entry[0])


@pytest.mark.parametrize(
    ("architecture", "device", "devices", "batch", "length", "memory_mib", "concurrent_devices"),
    [
        (GPT, "MI250 GCD", 8, 16, 512, 65520, None),
        (GPT, "A100 40GB", 12, 24, 1024, 2000, None),
        (GPT, "A100 40GB", 12, 24, 1024, 2000, 4),
        (LLAMA, "H100 80GB", 8, 32, 2048, 81559, None),
        (LLAMA, "MI250 GCD", 16, 32, 1024, 9000, None),
        (LLAMA, "V100 16GB", 8, 8, 512, 5000, None),
    ],
)
def test_pruned_search_returns_the_optimum_of_the_exhaustive_one(
    architecture, device, devices, batch, length, memory_mib, concurrent_devices
):
    environment = with_memory(environment_of(device, devices), memory_mib)
    environment = replace(environment, cluster=replace(environment.cluster, concurrent_devices=concurrent_devices))
    training = Training(architecture, batch, length)
    plans = search_exhaustively(training, environment, Constraints())
    result = search(training, environment, count=5)
    assert 0 < len(plans) < result.candidates or memory_mib > 60000  # memory does decide in the small cases
    assert result.possible == len(plans)
    expected = [seconds for seconds, _ in plans[:5]]
    assert [best.step_time_s for best in result.best] == pytest.approx(expected, rel=1e-8)
    assert len({plan for _, plan in plans}) == len(plans)  # no candidate twice


def test_pruned_search_returns_the_optimum_with_experts_and_context():
    """With expert and context parallelism in the space; the best plans use both."""
    environment = with_memory(environment_of("H100 80GB", 16), 20_000)
    environment = replace(environment, cluster=replace(environment.cluster, devices_per_node=4))
    training = Training(MOE, 32, 4096)
    constraints = Constraints(max_context=2, max_expert=8)
    plans = search_exhaustively(training, environment, constraints)
    result = search(training, environment, constraints, count=5)
    assert 0 < len(plans) == result.possible < result.candidates
    assert [best.step_time_s for best in result.best] == pytest.approx([seconds for seconds, _ in plans[:5]], rel=1e-8)
    assert {plan.expert for _, plan in plans} == {1, 2, 4, 8}
    assert {plan.context for _, plan in plans} == {1, 2}
    assert result.best[0].plan.expert > 1


def test_search_with_a_wrong_bound_misses_the_optimum(monkeypatch):
    """With a bound that is none, the search stops too early, so the comparison above can fail."""
    environment = environment_of("MI250 GCD", 16)
    constraints = Constraints(pipeline=4)
    right = search(Training(LLAMA, 32, 1024), environment, constraints, count=1)
    monkeypatch.setattr(
        "moreh.planner.search.search.makespan_lower_bound", lambda table: 1e6 / makespan_lower_bound(table)
    )
    wrong = search(Training(LLAMA, 32, 1024), environment, constraints, count=1)
    assert wrong.best[0].step_time_s > right.best[0].step_time_s * 1.5


def test_large_case_has_ten_thousand_candidates_and_its_best_plans_fit():
    training = Training(describe(MODELS / "llama3_70b.json"), 512, 1024)
    environment = make_environment(cluster_for_flavor(find_flavor("8xLarge.4096GB")))
    result = search(training, environment)
    assert result.candidates >= 10_000
    assert 0 < result.possible < result.candidates
    assert len(result.best) == 10
    limit = 0.8 * environment.cluster.device.memory_bytes
    for best in result.best:
        assert best.memory_bytes <= limit
        assert best.plan.devices == 64
        assert best.plan.global_batch_size == 512
        assert predict(best.plan, training, environment).step_time_s == pytest.approx(best.step_time_s, rel=1e-9)
    seconds = [best.step_time_s for best in result.best]
    assert seconds == sorted(seconds)


def test_more_memory_or_a_faster_link_never_makes_the_best_plan_slower():
    changed_memory = changed_link = 0
    constraints = Constraints(memory_fraction=1)
    for training, drawn in random_trainings(25):
        environment = with_memory(drawn, 10_000_000)  # some of the devices are too small for the models
        device = environment.cluster.device
        result = search(training, environment, constraints, count=1)
        needed_mib = result.smallest_bytes / 2**20
        small = search(training, with_memory(environment, int(needed_mib * 1.2) + 1), constraints, count=1)
        large = search(training, with_memory(environment, int(needed_mib * 3) + 2), constraints, count=1)
        assert large.best[0].step_time_s <= small.best[0].step_time_s
        changed_memory += large.best[0].step_time_s < small.best[0].step_time_s
        for name in ("node_bytes_per_second", "network_bytes_per_second"):
            cluster = replace(environment.cluster, device=replace(device, **{name: 2 * getattr(device, name)}))
            faster = search(training, replace(environment, cluster=cluster), constraints, count=1)
            assert faster.best[0].step_time_s <= result.best[0].step_time_s * (1 + 1e-9)
            changed_link += faster.best[0].step_time_s < result.best[0].step_time_s * (1 - 1e-9)
    assert changed_memory > 5  # neither holds because nothing ever changes
    assert changed_link > 5


def test_threads_do_not_change_the_result():
    environment = environment_of("MI250 GCD", 8)
    training = Training(LLAMA, 16, 512)
    one_thread, four_threads = search(training, environment), search(training, environment, threads=4)
    assert [best.plan for best in one_thread.best] == [best.plan for best in four_threads.best]
