"""Predictions of whole steps: what none may claim, and what they are made of."""

import numpy as np
import pytest

from moreh.accelerator.devices import find_device
from moreh.models.describe.from_source import describe
from moreh.planner.cost.prediction import model_flops_per_step, predict, step_seconds
from moreh.planner.cost.stage_time import stage_time
from moreh.planner.hardware.cluster import cluster_for_devices
from moreh.planner.hardware.environment import make_environment
from moreh.planner.plan.plan import Training
from moreh.planner.search.candidates import candidate_tables
from moreh.planner.search.constraints import Constraints
from moreh.planner.search.search import search
from moreh.planner.software_profile import MOREH, moreh_software
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
