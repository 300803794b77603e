"""Predictions of whole steps: what none may claim, and what they are made of."""

from dataclasses import replace

import numpy as np
import pytest

from moreh.accelerator.devices import find_device
from moreh.models.describe.from_source import describe
from moreh.planner.cost.first_pass import first_pass_s
from moreh.planner.cost.memory.peak_memory import peak_memory
from moreh.planner.cost.prediction import model_flops_per_step, predict, step_seconds
from moreh.planner.cost.stage_time import stage_time
from moreh.planner.hardware.cluster import cluster_for_devices
from moreh.planner.hardware.environment import make_environment
from moreh.planner.plan.notation import parse_plan
from moreh.planner.plan.plan import Training
from moreh.planner.plan.plan_table import PlanTable
from moreh.planner.search.candidates import candidate_tables
from moreh.planner.search.constraints import Constraints
from moreh.planner.search.search import search
from moreh.planner.software_profile import MOREH, moreh_software, worker_software
from tests.helpers.planner.cases import LLAMA, MODELS, environment_of, random_trainings


def test_no_prediction_exceeds_the_peak():
    rng = np.random.default_rng(1)
    for training, environment in random_trainings(25):
        shortest_s = model_flops_per_step(training) / environment.peak_flops_per_second
        for table in candidate_tables(environment.roofline, environment.cluster, training, Constraints(max_context=2)):
            times = stage_time(environment.roofline, environment.cluster, table, training)
            for row in rng.choice(len(table), size=min(4, len(table)), replace=False):
                seconds = step_seconds(table, int(row), times)
                # float8 matmuls beside attention in half precision: still below the peak of float8.
                assert np.isfinite(seconds)
                assert seconds > shortest_s, (table.plan(int(row)), environment)


def test_parts_of_a_step_add_up_to_the_step_time():
    environment = environment_of("A100 80GB", 16)
    for best in search(Training(LLAMA, 64, 2048), environment, count=30).best:
        parts = best.parts
        total = sum(getattr(parts, name) for name in parts.__dataclass_fields__)
        assert total == pytest.approx(best.step_time_s, rel=1e-6)


def sharing_cores(environment, concurrent_devices):
    """The same devices, of which so many can compute at the same time."""
    return replace(environment, cluster=replace(environment.cluster, concurrent_devices=concurrent_devices))


def test_a_step_on_shared_cores_takes_the_work_of_all_workers():
    own_cores = environment_of("A100 80GB", 8)
    training = Training(LLAMA, 64, 2048)
    for best in search(training, own_cores, count=400).best:
        alone, shared = (predict(best.plan, training, sharing_cores(own_cores, count)) for count in (8, 2))
        assert alone == best
        parts = shared.parts
        total = sum(getattr(parts, name) for name in parts.__dataclass_fields__)
        assert total == pytest.approx(shared.step_time_s, rel=1e-6)
        assert shared.step_time_s <= 4 * alone.step_time_s * (1 + 1e-9)
        if best.plan.pipeline == 1:
            # No worker waits for another, so none leaves its core to others.
            assert shared.step_time_s == pytest.approx(4 * alone.step_time_s)
        else:
            # While a worker waits for its stage's input, others compute.
            assert alone.step_time_s <= shared.step_time_s < 4 * alone.step_time_s


def test_pipeline_with_one_micro_batch_gains_nothing_from_cores_of_its_own():
    """One stage computes at a time, so two cores are as good as eight."""
    own_cores = environment_of("A100 80GB", 8)
    training = Training(LLAMA, 1, 2048)
    plan = parse_plan("tp1 pp8 dp1 mb1x1", training, 8)
    alone, shared = (predict(plan, training, sharing_cores(own_cores, count)) for count in (8, 2))
    assert shared.parts.computation_s == alone.parts.computation_s
    assert shared.parts.bubble_s == pytest.approx(alone.parts.bubble_s)
    assert shared.parts.optimizer_s == pytest.approx(4 * alone.parts.optimizer_s)


@pytest.mark.parametrize("text", ["tp2 pp4 dp2 mb2x8", "tp1 pp1 dp16 mb4x1 shard:parameters", "tp4 pp2 dp2 mb1x16"])
def test_own_loss_repeats_forward_passes_and_has_the_logits_of_the_batch(text):
    environment = environment_of("A100 80GB", 16)
    training = Training(LLAMA, 64 if "mb4x1" in text else 32, 2048)
    plan = parse_plan(text, training, 16)
    built_in, own = (predict(plan, replace(training, own_loss=value), environment) for value in (False, True))
    assert built_in.parts.first_pass_s == 0
    forward_s = built_in.stage_forward_s
    # Each stage has kept the forward pass of the first micro-batch.
    pass_s = (plan.micro_batches - 1) * max(forward_s)
    assert own.parts.first_pass_s > pass_s
    assert own.step_time_s == pytest.approx(built_in.step_time_s + own.parts.first_pass_s)
    assert sum(getattr(own.parts, name) for name in own.parts.__dataclass_fields__) == pytest.approx(own.step_time_s)
    # Without the exchange of logits, it is less than a forward pass is of a step, which is about a third.
    assert (0 if plan.micro_batches == 1 else 0.2) <= pass_s / built_in.step_time_s < 0.33
    logits_bytes = 2 * 4 * training.tokens * LLAMA.vocabulary
    assert own.memory_bytes - built_in.memory_bytes == pytest.approx(logits_bytes)


@pytest.mark.parametrize(
    ("text", "alone_s", "shared_s"),
    [
        # The stages take 1, 2, 3 ... seconds. Alone: a micro-batch through the stages that keep none, and the busiest
        # rank's time for each further one. On 4 cores: twice what a rank repeats, on average.
        ("tp1 pp1 dp8 mb1x1", 0, 0),
        ("tp1 pp1 dp8 mb1x4", 3 * 1, 2 * 3 * 1),
        ("tp1 pp2 dp4 mb1x4", 3 * 2, 2 * (2 * 1 + 3 * 2) / 2),
        ("tp1 pp2 dp4 mb1x4 interleaved:2", (3 + 4) + 3 * 6, 2 * (2 * 1 + 3 * 2 + 4 * 3 + 4 * 4) / 2),
    ],
)
def test_kept_forward_passes_cost_nothing(text, alone_s, shared_s):
    own_cores = environment_of("A100 80GB", 8)
    rows = {"tp1 pp1 dp8 mb1x1": 8, "tp1 pp1 dp8 mb1x4": 32}.get(text, 16)
    training = Training(LLAMA, rows, 2048, own_loss=True)
    plan = parse_plan(text, training, 8)
    table = PlanTable.from_plans([plan])
    for environment, expected_s in ((own_cores, alone_s), (sharing_cores(own_cores, 4), max(alone_s, shared_s))):

        def cost_s(forward_s, environment=environment):
            return first_pass_s(environment.roofline, environment.cluster, table, forward_s, training)[0]

        stages = np.arange(1.0, len(plan.stage_layers) + 1)[None]
        assert cost_s(stages) - cost_s(np.zeros_like(stages)) == pytest.approx(expected_s)


def test_kept_forward_passes_of_a_pipeline_have_copies_of_weights():
    software = worker_software(bfloat16=True, half_weights=False)
    training = Training(LLAMA, 32, 2048)
    of_plans = []
    for text in ("tp1 pp1 dp8 mb1x4", "tp1 pp2 dp4 mb1x8"):
        table = PlanTable.from_plans([parse_plan(text, training, 8)])
        built_in, own = (
            peak_memory(table, replace(training, own_loss=own_loss), software).total for own_loss in (False, True)
        )
        of_plans.append(own - built_in)
    logits_bytes = 2 * 4 * training.tokens * LLAMA.vocabulary
    assert of_plans[0] == pytest.approx(logits_bytes)
    weights = sum(linear.inputs * linear.outputs for layer in LLAMA.layers for linear in layer.linears)
    assert of_plans[1] - logits_bytes == pytest.approx(2 * weights / 2, rel=0.01)  # 2 bytes of each, on 2 stages


def test_model_flops_are_those_counted_by_hand():
    # 6 FLOPs for each parameter outside the embedding and the norms, for attention 12 * layers * hidden * length / 2.
    training = Training(describe(MODELS / "llama3_8b.json"), 1, 8192)
    per_token = 6 * (8_030_261_248 - 128_256 * 4096 - 65 * 4096) + 12 * 32 * 4096 * 8192 / 2
    assert model_flops_per_step(training) == pytest.approx(8192 * per_token)


def test_float32_is_slower_and_needs_more_memory():
    cluster = cluster_for_devices(find_device("A100 80GB"), 8)
    training = Training(LLAMA, 16, 1024)
    half, float32 = (make_environment(cluster, software) for software in (MOREH, moreh_software("float32")))
    plan = search(training, half, count=1).best[0].plan
    assert predict(plan, training, float32).step_time_s > predict(plan, training, half).step_time_s
    assert predict(plan, training, float32).memory_bytes > predict(plan, training, half).memory_bytes
