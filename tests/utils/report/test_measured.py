"""The line at a run's end, and the file from which moreh-plan learns: medians of the last steps, without the first."""

import json

import pytest

from moreh.cli.calibration_file import read_measured_steps
from moreh.models.describe.from_source import describe_config
from moreh.planner.plan.plan import Training
from tests.helpers.planner.cases import environment_of
from tests.helpers.planner.plan_tool import MODEL
from utils.report.curves import RunCurves
from utils.report.measured import measured_run, summary_text, write_measured
from utils.report.run_state import RunState

PLAN = {
    "devices": "2 x H100 80GB",
    "simulated": False,
    "plan": "tp1 pp1 dp2 mb4x1",
    "batch_size": 8,
    "sequence_length": 256,
    "step_time_s": 0.6,
    "memory_bytes": 3 * 2**30,
    "notation": "tp1 pp1 dp2 mb4x1",
    "device": "H100 80GB",
    "device_count": 2,
}


def curves_of(*step_s, tokens=8 * 130 * 2):
    curves = RunCurves()
    for step, seconds in enumerate(step_s, start=1):
        rate = tokens / seconds
        curves.add({"step": step, "step_s": seconds, "real_tokens_per_s": rate, "memory_in_use_bytes": 2**31})
    return curves


def test_median_of_the_steps_is_that_of_a_batch():
    state = RunState(0.0, plans=[PLAN], batches_per_step=2)
    run = measured_run(state, curves_of(9.0, 1.0, 1.2, 1.1), rows_of_batch=8)
    assert (run.batch_s, run.memory_bytes) == (0.55, 2**31)
    assert run.row_tokens == pytest.approx(130)
    assert summary_text(run) == (
        "A batch took 550.00 ms (rows of 130 tokens without padding); predicted 304.69 ms (-45%), in "
        "proportion to 600.00 ms for rows of 256; torch.cuda.max_memory_allocated() 2.00 GiB measured, "
        "3.00 GiB predicted"
    )


def test_file_of_a_run_calibrates(tmp_path):
    state = RunState(0.0, plans=[PLAN], batches_per_step=2)
    write_measured(tmp_path, measured_run(state, curves_of(9.0, 1.0, 1.2, 1.1), rows_of_batch=8))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    asked = Training(describe_config({"model_type": "gpt2"}, "another"), 8, 128)
    (step,) = read_measured_steps(tmp_path, asked, environment_of("H100 80GB", 16))
    assert (step.plan.data, step.training.sequence_length, step.cluster.devices) == (2, 128, 2)
    assert len(step.training.architecture.layers) == MODEL["num_hidden_layers"]
    assert (step.step_time_s, step.memory_bytes) == (0.55, 2**31)


@pytest.mark.parametrize(
    ("plans", "steps"), [([], (1.0,) * 9), ([{**PLAN, "simulated": True}], (1.0,) * 9), ([PLAN], (1.0,) * 3)]
)
def test_nothing_is_said_of_runs_that_are_too_short_or_simulated(plans, steps):
    assert measured_run(RunState(0.0, plans=plans), curves_of(*steps), rows_of_batch=8) is None


def test_memory_of_a_cpu_is_not_that_of_a_gpu():
    state = RunState(0.0, plans=[PLAN], is_simulated=True)
    run = measured_run(state, curves_of(*(1.0,) * 9), rows_of_batch=8)
    assert run.memory_bytes is None
    assert "memory" not in summary_text(run)


def test_last_hundred_steps_count_after_the_first_are_gone():
    run = measured_run(RunState(0.0, plans=[PLAN]), curves_of(*(50.0,) * 60, *(1.0,) * 100), rows_of_batch=8)
    assert run.batch_s == 1.0
