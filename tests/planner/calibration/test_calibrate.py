"""Predictions with intervals, and the measured steps that narrow them."""

from dataclasses import replace

import numpy as np
import pytest

from moreh.accelerator.devices import find_device
from moreh.errors import PlanError
from moreh.models.architecture import Architecture, DecoderLayer, Linear
from moreh.planner.calibration.calibrate import calibrate, uncalibrated
from moreh.planner.calibration.measured_step import MeasuredStep
from moreh.planner.calibration.prediction import predict
from moreh.planner.calibration.sensitivity import log_step_time, log_step_time_slopes
from moreh.planner.cost.prediction import predict as predict_cost
from moreh.planner.hardware.cluster import cluster_for_devices
from moreh.planner.hardware.efficiency_distribution import from_unconstrained, to_unconstrained
from moreh.planner.hardware.environment import make_environment
from moreh.planner.optimizer_state import OPTIMIZER_STATES
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.search.search import search


def gpt(experts=1, active=1):
    hidden = 1024
    linears = (
        Linear("query", hidden, hidden, "column"),
        Linear("key", hidden, hidden, "column"),
        Linear("value", hidden, hidden, "column"),
        Linear("output", hidden, hidden, "row"),
        Linear("up", hidden, 4 * hidden, "column", copies=experts, active=active),
        Linear("down", 4 * hidden, hidden, "row", copies=experts, active=active),
    )
    layer = DecoderLayer(16, 16, 64, linears, 2 * hidden, 2)
    return Architecture(
        "GPT", "gpt2", hidden, 50304, (layer,) * 16, tied=True, gated=False, norm="layer", rotary=False, dropout=False
    )


def gpt_linears():
    return gpt().layers[0].linears


TRAINING = Training(gpt(), 64, 1024)
CLUSTER = cluster_for_devices(find_device("A100 80GB"), 16)
PLANS = [
    Plan((16,), data=16, micro_batch_size=2, micro_batches=2, sharding="parameters"),
    Plan((16,), data=8, tensor=2, micro_batch_size=4, micro_batches=2),
    Plan((8, 8), data=8, pipeline=2, micro_batch_size=1, micro_batches=8),
    Plan((4,) * 4, data=4, pipeline=4, micro_batch_size=1, micro_batches=16, recomputation="full"),
]


@pytest.fixture
def environment():
    return make_environment(CLUSTER)


def steps(environment, plans=PLANS, factor=1.0):
    """Steps as they would be measured in an environment."""
    seconds = [factor * predict_cost(plan, TRAINING, environment).step_time_s for plan in plans]
    pairs = zip(plans, seconds, strict=True)
    return [MeasuredStep(plan, TRAINING, environment.cluster, time_s) for plan, time_s in pairs]


def width(prediction):
    return prediction.step_time_s.high / prediction.step_time_s.low


def test_transform_of_constants_is_inverted(environment):
    values = to_unconstrained(environment.efficiency)
    assert np.isfinite(values).all()
    assert to_unconstrained(from_unconstrained(values)) == pytest.approx(values)


def test_slopes_are_those_of_the_step_time(environment):
    """All times grow with `slowdown`, and the sum of all that is in seconds is the step time."""
    plan = PLANS[1]
    slopes = log_step_time_slopes(plan, TRAINING, environment)
    slowed = replace(environment, efficiency=replace(environment.efficiency, slowdown=2.0))
    once = replace(environment, efficiency=replace(environment.efficiency, slowdown=1.0))
    assert slopes[-1] == pytest.approx(1)
    difference = log_step_time(plan, TRAINING, slowed) - log_step_time(plan, TRAINING, once)
    assert difference == pytest.approx(np.log(2))


def test_a_prediction_without_measurement_has_an_interval_around_it(environment):
    prediction = predict(PLANS[0], TRAINING, environment)
    assert prediction.cost == predict_cost(PLANS[0], TRAINING, environment)
    assert prediction.cost.step_time_s in prediction.step_time_s
    assert prediction.cost.tokens_per_second in prediction.tokens_per_second
    assert 1.1 < width(prediction) < 5
    assert prediction.memory_bytes.low < prediction.memory_bytes.high
    assert (prediction.measured_steps, prediction.text) == (0, "not calibrated")


@pytest.mark.parametrize("count", [1, 3])
def test_measured_steps_narrow_the_interval_and_move_it(environment, count):
    measured = steps(environment, PLANS[:count], factor=1.3)
    calibration = calibrate(measured)
    for plan in PLANS:
        before, after = predict(plan, TRAINING, environment), predict(plan, TRAINING, environment, calibration)
        truth = 1.3 * before.cost.step_time_s
        assert width(after) < width(before)
        assert abs(np.log(after.cost.step_time_s / truth)) < 0.6 * np.log(1.3)
        assert truth in after.step_time_s
        assert after.text == f"calibrated with {count} step{'s' * (count > 1)}"
    for step in measured:
        assert predict(step.plan, TRAINING, environment, calibration).cost.step_time_s == pytest.approx(
            step.step_time_s, rel=0.05
        )


def test_a_step_as_predicted_moves_nothing(environment):
    calibration = calibrate(steps(environment))
    assert to_unconstrained(calibration.posterior.median) == pytest.approx(to_unconstrained(environment.efficiency))


def test_a_program_with_other_constants_is_found(environment):
    """A slow network shows in the steps that use it, and the calibrated constants predict the others."""
    other = Plan((16,), data=16, micro_batch_size=1, micro_batches=4, sharding="parameters")
    slow = replace(environment, efficiency=replace(environment.efficiency, network=0.15))
    calibration = calibrate(steps(slow, [PLANS[0], *PLANS[2:]]))
    truth = predict_cost(other, TRAINING, slow).step_time_s
    error = predict(other, TRAINING, environment, calibration).cost.step_time_s / truth - 1
    uncalibrated_error = predict(other, TRAINING, environment).cost.step_time_s / truth - 1
    assert abs(error) < 0.8 * abs(uncalibrated_error)


def test_search_uses_calibrated_constants(environment):
    calibration = calibrate(steps(environment, factor=1.3))
    best = search(TRAINING, calibration.applied_to(environment), count=1).best[0]
    assert predict(best.plan, TRAINING, environment, calibration).cost == best


def test_memory_is_calibrated(environment):
    predicted = predict(PLANS[0], TRAINING, environment)
    measured = replace(steps(environment)[0], memory_bytes=1.2 * predicted.cost.memory_bytes)
    after = predict(PLANS[0], TRAINING, environment, calibrate([measured]))
    assert measured.memory_bytes in after.memory_bytes
    assert after.memory_bytes.high / after.memory_bytes.low < predicted.memory_bytes.high / predicted.memory_bytes.low
    assert after.memory_bytes.low > predicted.memory_bytes.low


def test_what_is_not_modeled_has_a_wide_interval_however_many_steps_were_measured(environment):
    calibration = calibrate(steps(environment) * 3)
    assert width(predict(PLANS[0], TRAINING, environment, calibration)) < 1.5
    experts = replace(TRAINING, architecture=gpt(8, 2))
    context = Plan((16,), data=8, context=2, micro_batch_size=8, micro_batches=1)
    float8 = make_environment(CLUSTER, replace(environment.software, compute="float8"))
    new = make_environment(cluster_for_devices(find_device("MI300X"), 16))
    for plan, training, where, word in (
        (PLANS[0], experts, environment, "experts"),
        (context, TRAINING, environment, "context"),
        (PLANS[0], TRAINING, float8, "float8"),
    ):
        prediction = predict(plan, training, where, calibration)
        assert width(prediction) >= 4 * (1 - 1e-9)
        assert word in prediction.text
    muon = replace(TRAINING, optimizer=OPTIMIZER_STATES["muon"])
    unknown = make_environment(CLUSTER, replace(environment.software, not_modeled="its trick is not modeled"))
    for training, where, word in ((muon, environment, "muon gathers"), (TRAINING, unknown, "trick")):
        prediction = predict(PLANS[0], training, where, calibration)
        assert width(prediction) >= 4 * (1 - 1e-9)
        assert word in prediction.text
    windowed = replace(TRAINING.architecture.layers[0], window=128)
    linear = replace(TRAINING.architecture.layers[0], state_elements=4096)
    frozen = replace(TRAINING.architecture.layers[0], linears=tuple(replace(x, frozen=True) for x in gpt_linears()))
    for layer, word in ((windowed, "window"), (linear, "linear attention"), (frozen, "frozen")):
        architecture = replace(TRAINING.architecture, layers=(layer,) * 16)
        prediction = predict(PLANS[0], replace(TRAINING, architecture=architecture), environment, calibration)
        assert width(prediction) >= 2
        assert word in prediction.text
    split = replace(PLANS[2], schedule="zero-bubble", chunks=2, stage_layers=(4,) * 4)
    for plan, training, word in (
        (split, TRAINING, "split backward"),
        (PLANS[0], replace(TRAINING, sequence_length=131_072), "65,536 tokens"),
    ):
        prediction = predict(plan, training, environment, calibration)
        assert width(prediction) >= 2
        assert word in prediction.text
    prediction = predict(PLANS[0], TRAINING, new)
    assert width(prediction) >= 2
    assert "MI300X" in prediction.text


def test_bad_measurements_are_refused(environment):
    step = steps(environment)[0]
    other = cluster_for_devices(find_device("H100 80GB"), 16)
    with pytest.raises(PlanError, match="at least one"):
        calibrate([])
    for change, reason in (
        ({"step_time_s": 0.0}, "above 0"),
        ({"step_time_s": float("nan")}, "above 0"),
        ({"memory_bytes": -1.0}, "memory"),
        ({"cluster": cluster_for_devices(CLUSTER.device, 8)}, "16 devices on 8"),
        ({"training": replace(TRAINING, global_batch_size=1)}, "batch of 1"),
    ):
        with pytest.raises(PlanError, match=reason):
            calibrate([replace(step, **change)])
    with pytest.raises(PlanError, match="H100 80GB cannot calibrate A100 80GB"):
        calibrate([step, replace(step, cluster=other)])


def test_a_calibration_is_of_one_class_of_devices(environment):
    calibration = uncalibrated(environment)
    with pytest.raises(PlanError, match="H100"):
        predict(PLANS[0], TRAINING, make_environment(cluster_for_devices(find_device("H100 80GB"), 16)), calibration)
