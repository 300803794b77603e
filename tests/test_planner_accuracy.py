"""The planner against published measurements that it was not fitted to, and the script that scores it on any such file."""

import csv
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from planner_accuracy import kendall_tau, regret, score  # noqa: E402
from published_runs import Unusable, published_run, read_rows, usable_runs  # noqa: E402

from moreh.planner.efficiency import fitted_rows  # noqa: E402

RUNS = ROOT / "benchmarks" / "data" / "published_runs.csv"
# The platform's own speeds are shown beside the predictions, and neither fitted nor tested.
REFERENCE = "Moreh docs MI250"


@pytest.fixture(scope="module")
def scored():
    fitted = fitted_rows()
    return [score(run, fitted) for _, run, _ in usable_runs(read_rows(RUNS)) if run is not None]


def test_at_most_half_of_each_group_was_fitted(scored):
    groups = {entry.run.group for entry in scored}
    assert len(groups) > 10
    for group in groups:
        tested = [entry.tested for entry in scored if entry.run.group == group]
        assert sum(tested) >= len(tested) / 2


def test_time_of_rows_that_were_not_fitted(scored):
    errors = [abs(entry.time_error) for entry in scored if entry.tested and entry.run.group != REFERENCE]
    assert len(errors) > 150
    assert statistics.fmean(errors) < 0.06
    on_mi250x = [abs(entry.time_error) for entry in scored if entry.tested and entry.run.group == "LUMI MI250X"]
    assert max(on_mi250x) < 0.1


def test_memory(scored):
    errors = [abs(entry.memory_error) for entry in scored if entry.memory_error is not None]
    assert len(errors) > 30
    assert statistics.median(errors) < 0.03
    assert max(errors) < 0.1


def test_ranking_of_sweeps(scored):
    sweeps = {}
    for entry in scored:
        if entry.tested:
            sweeps.setdefault(entry.run.sweep, []).append((entry.prediction.step_time_s, entry.run.step_time_s))
    large = [list(zip(*pairs, strict=True)) for pairs in sweeps.values() if len(pairs) >= 5]
    assert len(large) == 2
    for predicted, measured in large:
        assert kendall_tau(predicted, measured) > 0.8
        assert regret(predicted, measured) < 0.06


def test_predictions_tell_plans_of_the_same_work_apart(scored):
    """A single efficiency would give all of a sweep the same time."""
    sweep = [entry for entry in scored if entry.run.training.architecture.name == "GPT 3.6B" and "vTrain" in entry.run.group]
    seconds = {round(entry.prediction.step_time_s, 6) for entry in sweep}
    assert len(seconds) == len(sweep) > 20


def test_kendall_tau_and_regret():
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1
    assert kendall_tau([1, 2, 3], [30, 20, 10]) == -1
    assert kendall_tau([1, 1, 1], [1, 2, 3]) == 0
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert regret([1, 2, 3], [12, 10, 11]) == pytest.approx(0.2)


ROW = {
    "group": "new",
    "framework": "Megatron-LM",
    "model": "GPT 1B",
    "layers": "24",
    "hidden": "2048",
    "heads": "16",
    "seq_len": "2048",
    "gpu": "A100-SXM4-80GB",
    "n_gpus": "16",
    "tp": "2",
    "pp": "2",
    "dp": "4",
    "mbs": "2",
    "gbs": "64",
    "precision": "bf16",
    "recompute": "full",
    "step_time_s": "2.0",
}


def row(**changes):
    with RUNS.open(encoding="utf-8", newline="") as file:
        columns = csv.DictReader(file).fieldnames
    return {**dict.fromkeys(columns, ""), "id": "1", **ROW, **changes}


def test_a_row_is_read_as_what_it_says():
    run = published_run(row(vpp="3", sharding="ZeRO-1"))
    plan = run.plans[0]
    assert (plan.tensor, plan.pipeline, plan.data, plan.chunks, plan.schedule) == (2, 2, 4, 3, "interleaved")
    assert (plan.micro_batch_size, plan.micro_batches, plan.recomputation, plan.sharding) == (2, 8, "full", "optimizer")
    assert run.training.tokens == 64 * 2048
    assert run.cluster.devices == 16


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden": ""}, "hidden is not given"),
        ({"gpu": "TPU v4"}, "no data of device 'TPU v4'"),
        ({"tp": ""}, "the plan is not given"),
        ({"tp": "3"}, "does not divide 16 devices"),
        ({"ep": "4"}, "expert parallelism is not modelled"),
        ({"gbs": "63"}, "gbs 63 is no multiple"),
        ({"layers": "many"}, "layers='many' is no number"),
        ({"layers": "1"}, "fewer layers than stages"),
        ({"seq_len": ""}, "seq_len is not given"),
        ({"mbs": "", "gbs": ""}, "neither mbs nor a gbs"),
        ({"vpp": "3", "gbs": "40"}, "cannot be divided into"),
    ],
)
def test_rows_that_lack_something_are_counted_with_the_reason(changes, reason):
    with pytest.raises(Unusable, match=reason):
        published_run(row(**changes))


def test_a_row_that_ran_out_of_memory_is_predicted_not_to_fit():
    out_of_memory = published_run(
        row(tp="1", pp="1", dp="16", mbs="4", layers="48", hidden="6144", step_time_s="", notes="OOM")
    )
    assert out_of_memory.out_of_memory
    assert not score(out_of_memory, frozenset()).fits
    assert score(published_run(row()), frozenset()).fits


def test_script_works_on_other_rows(tmp_path):
    rows = [row(id="a"), row(id="b", hidden=""), row(id="c", step_time_s="", tflops_per_gpu="", tok_s_per_gpu="6000")]
    source, out = tmp_path / "runs.csv", tmp_path / "predictions.csv"
    with source.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    command = [sys.executable, str(ROOT / "benchmarks" / "planner_accuracy.py"), str(source), "--out", str(out)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    assert "3 rows: 2 predicted, of which 0 were used to fit the constants" in finished.stdout
    assert "1 not predicted: hidden is not given" in finished.stdout
    with out.open(encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    assert [line["id"] for line in written] == ["a", "b", "c"]
    assert list(written[0]) == [
        "id",
        "predicted_step_time_s",
        "predicted_tokens_per_s_per_device",
        "predicted_memory_gib",
        "fits",
        "skipped_because",
    ]
    assert float(written[0]["predicted_step_time_s"]) > 0
    assert float(written[0]["predicted_tokens_per_s_per_device"]) == pytest.approx(
        64 * 2048 / 16 / float(written[0]["predicted_step_time_s"]), rel=1e-4
    )
    assert written[1]["predicted_step_time_s"] == ""
    assert written[1]["skipped_because"] == "hidden is not given"
