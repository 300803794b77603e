"""The planner against published measurements that it was not fitted to, and the script that scores it on any such file."""

import csv
import io
import os
import statistics
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import planner_accuracy
from planner_accuracy import kendall_tau, main, regret, score, score_or_reason
from published_programs import Unusable
from published_runs import published_run, read_rows, row_digest, usable_runs

from moreh.planner.hardware.efficiency import fitted_rows

RUNS = ROOT / "benchmarks" / "data" / "published_runs.csv"
# The platform's own speeds are shown beside the predictions, and neither fitted nor tested.
REFERENCE = "Moreh docs MI250"


@pytest.fixture(scope="module")
def scored():
    fitted = fitted_rows()
    return [score(run, fitted) for _, run, _ in usable_runs(read_rows(RUNS)) if run is not None]


def test_most_published_rows_can_be_predicted(scored):
    assert len(scored) >= 346


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
    sweep = [
        entry for entry in scored if entry.run.training.architecture.name == "GPT 3.6B" and "vTrain" in entry.run.group
    ]
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
        ({"dp": "2"}, r"dp=2 contradicts 16 devices / \(tp x pp x cp\) = 4"),
        ({"gpu": "MI250 (package, 2 GCD)", "dp": "5"}, r"dp=5 contradicts 32 devices / \(tp x pp x cp\) = 8"),
        ({"gbs": "63"}, "gbs 63 is no multiple"),
        ({"layers": "many"}, "layers='many' is no number"),
        ({"layers": "1"}, "fewer layers than stages"),
        ({"layers": "1e9"}, "layers='1e9' is no whole number from 1 to 10,000"),
        ({"tp": "0"}, "tp='0' is no whole number from 1"),
        ({"pp": "0.4"}, "pp='0.4' is no whole number"),
        ({"mbs": "-2"}, "mbs='-2' is no whole number"),
        ({"seq_len": "1e18"}, "seq_len='1e18' is no whole number from 1 to 1,000,000,000"),
        ({"gbs": "inf"}, "gbs='inf' is no whole number"),
        ({"n_gpus": "nan"}, "n_gpus is not given"),
        ({"hidden": "8"}, "heads of size 0: hidden=8 < heads=16"),
        ({"mbs": "1", "gbs": "1e9", "dp": "", "n_gpus": "4"}, "too many to simulate"),
        ({"seq_len": ""}, "seq_len is not given"),
        ({"mbs": "", "gbs": ""}, "neither mbs nor a gbs"),
        ({"vpp": "3", "gbs": "40"}, "cannot be divided into"),
    ],
)
def test_rows_that_lack_something_are_counted_with_the_reason(changes, reason):
    with pytest.raises(Unusable, match=reason):
        published_run(row(**changes))


def test_whole_numbers_may_be_written_as_fractions():
    assert published_run(row(tp="2.0", layers="24.0", mbs=" 2 ")).plans == published_run(row()).plans


def test_a_package_may_count_as_one_or_as_two():
    for data in ("4", "8", ""):
        run = published_run(row(gpu="MI250 (package, 2 GCD)", dp=data))
        assert (run.units, run.cluster.devices, run.plans[0].data) == (16, 32, 8)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e400", "1e-320"])
def test_a_measurement_that_is_no_positive_number_is_not_given(text):
    nothing = dict.fromkeys(("step_time_s", "tok_s_per_gpu", "tok_s_total", "samples_s_total", "tflops_per_gpu"), text)
    run = published_run(row(**{**nothing, "step_time_s": "0"}, peak_mem_gib_per_gpu="-1"))
    assert (run.step_time_s, run.memory_gib) == (None, None)
    assert (
        published_run(row(**{**nothing, "tok_s_per_gpu": "0", "tok_s_total": "65536", "step_time_s": ""})).step_time_s
        == 2
    )


NASTY = [
    "",
    "0",
    "0.4",
    "-8",
    "8.0",
    "3",
    "1e9",
    "1e18",
    "1e400",
    "1e-320",
    "nan",
    "many",
    "x" * 9999,
    "\xe9\ufffd",
    "\n",
    None,
]


@pytest.mark.parametrize(
    "changes", [{}, {"framework": "torchtitan", "model": "Llama"}, {"gpu": "MI250 (package, 2 GCD)", "dp": ""}]
)
def test_no_cell_makes_a_row_raise_anything_but_its_reason(changes):
    good = row(**changes)
    predicted = 0
    for column in good:
        cases = [{**good, column: text} for text in NASTY]
        cases.append({name: text for name, text in good.items() if name != column})
        for case in cases:
            try:
                run = published_run(case)
            except Unusable:
                continue
            entry, reason = score_or_reason(run, frozenset())
            assert entry is not None, (column, case.get(column), reason)
            assert entry.time_error is None or entry.time_error >= -1
            predicted += 1
    assert predicted > 300


def test_a_prediction_that_fails_is_a_reason(monkeypatch):
    run = published_run(row())

    def fails(*_):
        raise ValueError("first line\nsecond line")

    monkeypatch.setattr(planner_accuracy, "predict", fails)
    assert score_or_reason(run, frozenset()) == (None, "the prediction failed: ValueError: first line second line")


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_prediction_that_is_no_number_is_a_reason(monkeypatch, figure):
    run = published_run(row())
    predicted = score(run, frozenset())
    bad = replace(predicted, prediction=replace(predicted.prediction, step_time_s=figure))
    monkeypatch.setattr(planner_accuracy, "score", lambda *_: bad)
    entry, reason = score_or_reason(run, frozenset())
    assert entry is None
    assert "no finite positive number" in reason


def test_fitted_rows_are_told_by_what_they_say_not_by_their_id(scored):
    source = next(line for line in read_rows(RUNS) if row_digest(line) in fitted_rows())
    empty = dict.fromkeys(("id", "another_column"), "")
    assert not score(published_run({**source, **empty}), fitted_rows()).tested
    assert score(published_run({**source, "gbs": "", "tok_s_per_gpu": "7"}), fitted_rows()).tested
    assert len({entry.run.digest for entry in scored}) == len(scored)
    assert fitted_rows() == {entry.run.digest for entry in scored if not entry.tested}


def test_every_row_of_a_damaged_file_gets_a_line(tmp_path, capsys):
    rows = [row(id="1"), row(id="2", tp="0"), row(id="3", model="Mod\xe8le"), row(id="4")]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    text.write('5,cut off\r\n,\r\n7,nul \0\r\n8,"never closed' + "x," * 100_000)
    source, out = tmp_path / "runs.csv", tmp_path / "predictions.csv"
    source.write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode("latin-1"))
    assert main([str(source), "--out", str(out)]) == 0
    assert "8 rows: 3 predicted" in capsys.readouterr().out
    with out.open(encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    assert [line["id"] for line in written] == ["1", "2", "3", "4", "5", "", "7", "8"]
    assert [bool(line["predicted_step_time_s"]) for line in written] == [
        True,
        False,
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    assert written[1]["skipped_because"].startswith("tp='0' is no whole number")
    assert all(line["skipped_because"] for line in written if not line["predicted_step_time_s"])


@pytest.mark.parametrize("column", ["id", "group", "framework", "gpu", "model", "precision", "recompute", "sharding"])
def test_a_file_may_lack_a_column(tmp_path, capsys, column):
    lines = [row(id=str(number), mbs=str(number)) for number in (1, 2, 4)]
    source = tmp_path / "runs.csv"
    with source.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [name for name in lines[0] if name != column], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(lines)
    assert main([str(source)]) == 0
    printed = capsys.readouterr().out
    assert ("3 not predicted: no data of device ''" if column == "gpu" else "3 rows: 3 predicted") in printed


def test_a_row_that_ran_out_of_memory_is_predicted_not_to_fit():
    out_of_memory = published_run(
        row(tp="1", pp="1", dp="16", mbs="4", layers="48", hidden="6144", step_time_s="", notes="OOM")
    )
    assert out_of_memory.out_of_memory
    assert not score(out_of_memory, frozenset()).fits
    assert score(published_run(row()), frozenset()).fits


def test_script_works_on_other_rows(tmp_path):
    rows = [
        row(id="a", group="Universit\xe4t"),
        row(id="b", hidden=""),
        row(id="c", step_time_s="", tflops_per_gpu="", tok_s_per_gpu="6000"),
    ]
    source, out = tmp_path / "runs.csv", tmp_path / "predictions.csv"
    with source.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    command = [sys.executable, str(ROOT / "benchmarks" / "planner_accuracy.py"), str(source), "--out", str(out)]
    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
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
