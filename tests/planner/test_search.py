"""The search: which plans it considers, that it leaves out none that could win, and what no prediction may claim."""

from dataclasses import replace

import numpy as np
import pytest

from moreh.accelerator.devices import all_devices, find_device
from moreh.accelerator.flavors import find_flavor
from moreh.errors import PlanError
from moreh.models.describe.from_source import describe, describe_config
from moreh.planner.cost.memory import peak_memory
from moreh.planner.cost.pipeline_bounds import makespan_lower_bound
from moreh.planner.cost.prediction import model_flops_per_step, predict, step_seconds
from moreh.planner.cost.stage_time import stage_time
from moreh.planner.hardware.cluster import cluster_for_devices, cluster_for_flavor
from moreh.planner.hardware.environment import Environment, make_environment
from moreh.planner.plan.layer_balancing import even_layers, layers_balanced_by_stage
from moreh.planner.plan.plan import Training
from moreh.planner.plan.schedules import check_schedule
from moreh.planner.search.candidates import candidate_tables
from moreh.planner.search.constraints import Constraints
from moreh.planner.search.search import search
from moreh.planner.software_profile import MOREH, moreh_software
from tests.conftest import ROOT

MODELS = ROOT / "configs" / "models"
GPT = describe_config({"model_type": "gpt2", "n_layer": 6, "n_embd": 768, "n_head": 12}, "gpt")
LLAMA = describe_config(
    {
        "model_type": "llama",
        "num_hidden_layers": 8,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "llama",
)


def with_memory(environment, mebibytes):
    device = replace(environment.cluster.device, memory_mib=mebibytes)
    return replace(environment, cluster=replace(environment.cluster, device=device))


def exhaustive(training, environment, constraints):
    """Every candidate that fits, simulated; (seconds, plan), fastest first."""
    found = []
    limit = environment.cluster.device.memory_bytes * constraints.memory_fraction
    for table in candidate_tables(environment.roofline, environment.cluster, training, constraints):
        times = stage_time(environment.roofline, environment.cluster, table, training)
        fits = peak_memory(table, training, environment.software).total.max(axis=1) <= limit
        found += [(step_seconds(table, row, times), table.plan(row)) for row in np.flatnonzero(fits)]
    return sorted(found, key=lambda entry: entry[0])


@pytest.mark.parametrize(
    ("architecture", "device", "devices", "batch", "length", "mebibytes"),
    [
        (GPT, "MI250 GCD", 8, 16, 512, 65520),
        (GPT, "A100 40GB", 12, 24, 1024, 2000),
        (LLAMA, "H100 80GB", 8, 32, 2048, 81559),
        (LLAMA, "MI250 GCD", 16, 32, 1024, 9000),
        (LLAMA, "V100 16GB", 8, 8, 512, 5000),
    ],
)
def test_pruned_search_returns_the_optimum_of_the_exhaustive_one(
    architecture, device, devices, batch, length, mebibytes
):
    environment = with_memory(make_environment(cluster_for_devices(find_device(device), devices)), mebibytes)
    training = Training(architecture, batch, length)
    everything = exhaustive(training, environment, Constraints())
    found = search(training, environment, count=5)
    assert 0 < len(everything) < found.candidates or mebibytes > 60000  # memory does decide in the small cases
    assert found.possible == len(everything)
    expected = [seconds for seconds, _ in everything[:5]]
    assert [best.step_time_s for best in found.best] == pytest.approx(expected, rel=1e-8)
    assert len({plan for _, plan in everything}) == len(everything)  # no candidate twice


def test_a_wrong_bound_is_seen(monkeypatch):
    """With a bound that is none the search stops too early, so the comparison above can fail."""
    environment = make_environment(cluster_for_devices(find_device("MI250 GCD"), 16))
    constraints = Constraints(pipeline=4)
    right = search(Training(LLAMA, 32, 1024), environment, constraints, count=1)
    monkeypatch.setattr(
        "moreh.planner.search.search.makespan_lower_bound", lambda *arguments: 1e6 / makespan_lower_bound(*arguments)
    )
    wrong = search(Training(LLAMA, 32, 1024), environment, constraints, count=1)
    assert wrong.best[0].step_time_s > right.best[0].step_time_s * 1.5


def test_the_large_case_has_ten_thousand_candidates():
    training = Training(describe(MODELS / "llama3_70b.json"), 512, 1024)
    environment = make_environment(cluster_for_flavor(find_flavor("8xLarge.4096GB")))
    found = search(training, environment)
    assert found.candidates >= 10_000
    assert 0 < found.possible < found.candidates
    assert len(found.best) == 10
    limit = 0.8 * environment.cluster.device.memory_bytes
    for best in found.best:
        assert best.memory_bytes <= limit
        assert best.plan.devices == 64
        assert best.plan.global_batch_size == 512
        assert predict(best.plan, training, environment).step_time_s == pytest.approx(best.step_time_s, rel=1e-9)
    seconds = [best.step_time_s for best in found.best]
    assert seconds == sorted(seconds)


def test_candidates_can_all_be_run():
    training = Training(LLAMA, 24, 512)
    environment = make_environment(cluster_for_devices(find_device("MI250 GCD"), 8))
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
    kinds = {name: {getattr(plan, name) for plan in plans} for name in plans[0].__dataclass_fields__}
    assert kinds["schedule"] == {"1f1b", "interleaved", "zero-bubble", "zbv"}
    assert kinds["recomputation"] == {"none", "selective", "full"}
    assert kinds["sharding"] == {"none", "optimizer", "gradients", "parameters"}
    assert kinds["context"] == {1, 2}
    assert any(max(plan.stage_layers) - min(plan.stage_layers) > 0 for plan in plans)  # uneven stages


@pytest.mark.parametrize(
    ("constraints", "holds"),
    [
        (Constraints(pipeline=4), lambda plan: plan.pipeline == 4),
        (Constraints(micro_batches=2), lambda plan: plan.micro_batches == 2),
        (Constraints(recompute=True), lambda plan: plan.recomputation != "none"),
        (Constraints(recompute=False), lambda plan: plan.recomputation == "none"),
        (Constraints(shard_parameters=True), lambda plan: plan.sharding == "parameters"),
        (Constraints(shard_parameters=False), lambda plan: plan.sharding != "parameters"),
        (Constraints(max_tensor=1), lambda plan: plan.tensor == 1),
        (Constraints(schedules=("1f1b",)), lambda plan: plan.schedule == "1f1b"),
    ],
)
def test_restrictions_hold(constraints, holds):
    environment = make_environment(cluster_for_devices(find_device("MI250 GCD"), 8))
    found = search(Training(LLAMA, 16, 512), environment, constraints, count=50)
    assert found.best
    assert all(holds(best.plan) for best in found.best)
    assert found.candidates < search(Training(LLAMA, 16, 512), environment).candidates


def test_what_cannot_be_divided_is_told():
    environment = make_environment(cluster_for_devices(find_device("MI250 GCD"), 7))
    with pytest.raises(PlanError, match="no plan divides a batch of 5 x 64 over 7 devices"):
        search(Training(GPT, 5, 64), environment)
    with pytest.raises(PlanError, match="3 stages: the number must divide 7 devices"):
        search(Training(GPT, 7, 64), environment, Constraints(pipeline=3))
    with pytest.raises(PlanError, match="both numbers must be at least 1"):
        search(Training(GPT, 0, 64), environment)


def random_cases(count):
    """Random models, trainings and clusters."""
    generator = np.random.default_rng(0)
    names = list(all_devices())
    for _ in range(count):
        heads = int(2 ** generator.integers(2, 6))
        hidden = heads * int(generator.choice([64, 128]))
        config = {
            "model_type": "llama",
            "num_hidden_layers": int(generator.integers(2, 13)),
            "hidden_size": hidden,
            "intermediate_size": int(hidden * generator.choice([2, 3, 4])),
            "num_attention_heads": heads,
            "num_key_value_heads": int(2 ** generator.integers(1, np.log2(heads) + 1)),
            "vocab_size": int(generator.choice([1000, 32000, 128256])),
        }
        device = find_device(str(generator.choice(names)))
        devices = int(2 ** generator.integers(0, 5))
        training = Training(
            describe_config(config, "random"),
            devices * int(2 ** generator.integers(0, 4)),
            int(2 ** generator.integers(7, 13)),
        )
        computes = ["half", "float32"] + (["float8"] if device.float8_flops_per_second else [])
        software = moreh_software(str(generator.choice(computes)))
        yield training, make_environment(cluster_for_devices(device, devices), software)


def test_no_prediction_exceeds_the_peak():
    generator = np.random.default_rng(1)
    for training, environment in random_cases(25):
        least = model_flops_per_step(training) / environment.peak_flops_per_second
        for table in candidate_tables(environment.roofline, environment.cluster, training, Constraints(max_context=2)):
            times = stage_time(environment.roofline, environment.cluster, table, training)
            for row in generator.choice(len(table), size=min(4, len(table)), replace=False):
                seconds = step_seconds(table, int(row), times)
                # float8 products beside attention in half precision: still below the peak of float8.
                assert np.isfinite(seconds)
                assert seconds > least, (table.plan(int(row)), environment)


def test_more_memory_or_a_faster_link_never_makes_the_best_plan_slower():
    changed_memory = changed_link = 0
    for training, environment in random_cases(25):
        device = environment.cluster.device
        found = search(training, environment, Constraints(memory_fraction=1), count=1)
        needed = found.smallest_bytes / 2**20
        small = search(
            training, with_memory(environment, int(needed * 1.2) + 1), Constraints(memory_fraction=1), count=1
        )
        large = search(training, with_memory(environment, int(needed * 3) + 2), Constraints(memory_fraction=1), count=1)
        assert large.best[0].step_time_s <= small.best[0].step_time_s
        changed_memory += large.best[0].step_time_s < small.best[0].step_time_s
        for name in ("node_bytes_per_second", "network_bytes_per_second"):
            cluster = replace(environment.cluster, device=replace(device, **{name: 2 * getattr(device, name)}))
            faster = search(training, replace(environment, cluster=cluster), Constraints(memory_fraction=1), count=1)
            assert faster.best[0].step_time_s <= found.best[0].step_time_s * (1 + 1e-9)
            changed_link += faster.best[0].step_time_s < found.best[0].step_time_s * (1 - 1e-9)
    assert changed_memory > 5  # neither is so because nothing ever changes
    assert changed_link > 5


def test_threads_do_not_change_the_result():
    environment = make_environment(cluster_for_devices(find_device("MI250 GCD"), 8))
    training = Training(LLAMA, 16, 512)
    one, many = search(training, environment), search(training, environment, threads=4)
    assert [best.plan for best in one.best] == [best.plan for best in many.best]


def test_parts_of_a_step_add_up():
    environment = make_environment(cluster_for_devices(find_device("A100 80GB"), 16))
    for best in search(Training(LLAMA, 64, 2048), environment, count=30).best:
        parts = best.parts
        total = sum(getattr(parts, name) for name in parts.__dataclass_fields__)
        assert total == pytest.approx(best.step_time_s, rel=1e-6)


def test_balanced_stages_are_optimal():
    from itertools import product

    generator = np.random.default_rng(2)
    for _ in range(60):
        layers, stages = int(generator.integers(4, 12)), int(generator.integers(2, 5))
        embedding, head = generator.uniform(0, 1, 1), generator.uniform(0, 3, 1)

        def load(counts, embedding=embedding, head=head):
            loads = np.array(counts, dtype=float)
            loads[0] += embedding[0]
            loads[-1] += head[0]
            return loads.max()

        found = layers_balanced_by_stage(layers, stages, embedding, head)[0]
        possible = [c for c in product(range(1, layers + 1), repeat=stages) if sum(c) == layers]
        assert found.sum() == layers
        assert load(found) == pytest.approx(min(load(counts) for counts in possible))
    assert even_layers(10, 4) == (2, 2, 3, 3)


def test_model_flops_of_a_known_model():
    # 6 FLOPs for each parameter outside the embedding and the norms, and 12 * layers * hidden * length / 2 for
    # attention.
    training = Training(describe(MODELS / "llama3_8b.json"), 1, 8192)
    per_token = 6 * (8_030_261_248 - 128_256 * 4096 - 65 * 4096) + 12 * 32 * 4096 * 8192 / 2
    assert model_flops_per_step(training) == pytest.approx(8192 * per_token)


def test_float32_is_slower_and_larger():
    cluster = cluster_for_devices(find_device("A100 80GB"), 8)
    training = Training(LLAMA, 16, 1024)
    half, single = (
        Environment(cluster, make_environment(cluster).efficiency, i) for i in (MOREH, moreh_software("float32"))
    )
    plan = search(training, half, count=1).best[0].plan
    assert predict(plan, training, single).step_time_s > predict(plan, training, half).step_time_s
    assert predict(plan, training, single).memory_bytes > predict(plan, training, half).memory_bytes
