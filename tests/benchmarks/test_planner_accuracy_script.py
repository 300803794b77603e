"""The script that scores the planner: it works on any file of runs, however damaged, and tells why rows are skipped."""

import csv
import io
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.conftest import ROOT
from tests.helpers.planner.published_rows import make_row, planner_accuracy, published_runs


def test_prediction_that_fails_is_reported_as_a_reason(monkeypatch):
    run = published_runs.published_run(make_row())

    def fails(*_):
        raise ValueError("first line\nsecond line")

    monkeypatch.setattr(planner_accuracy, "predict", fails)
    assert planner_accuracy.score_or_reason(run, frozenset()) == (
        None,
        "the prediction failed: ValueError: first line second line",
    )


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), 0.0, -1.0])
def test_prediction_that_is_not_a_number_is_reported_as_a_reason(monkeypatch, figure):
    run = published_runs.published_run(make_row())
    predicted = planner_accuracy.score(run, frozenset())
    bad = replace(predicted, prediction=replace(predicted.prediction, step_time_s=figure))
    monkeypatch.setattr(planner_accuracy, "score", lambda *_: bad)
    entry, reason = planner_accuracy.score_or_reason(run, frozenset())
    assert entry is None
    assert "not a finite positive number" in reason


def test_every_row_of_a_damaged_file_gets_a_line_of_output(tmp_path, capsys):
    rows = [make_row(id="1"), make_row(id="2", tp="0"), make_row(id="3", model="Mod\xe8le"), make_row(id="4")]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    text.write('5,cut off\r\n,\r\n7,nul \0\r\n8,"never closed' + "x," * 100_000)
    source, out = tmp_path / "runs.csv", tmp_path / "predictions.csv"
    source.write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode("latin-1"))
    assert planner_accuracy.main([str(source), "--out", str(out)]) == 0
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
    assert written[1]["skipped_because"].startswith("tp='0' is not a whole number")
    assert all(line["skipped_because"] for line in written if not line["predicted_step_time_s"])


@pytest.mark.parametrize("column", ["id", "group", "framework", "gpu", "model", "precision", "recompute", "sharding"])
def test_file_may_lack_a_column(tmp_path, capsys, column):
    lines = [make_row(id=str(number), mbs=str(number)) for number in (1, 2, 4)]
    source = tmp_path / "runs.csv"
    with source.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [name for name in lines[0] if name != column], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(lines)
    assert planner_accuracy.main([str(source)]) == 0
    printed = capsys.readouterr().out
    assert ("3 not predicted: no data of device ''" if column == "gpu" else "3 rows: 3 predicted") in printed


def test_row_that_ran_out_of_memory_is_predicted_not_to_fit():
    out_of_memory = published_runs.published_run(
        make_row(tp="1", pp="1", dp="16", mbs="4", layers="48", hidden="6144", step_time_s="", notes="OOM")
    )
    assert out_of_memory.out_of_memory
    assert not planner_accuracy.score(out_of_memory, frozenset()).fits
    assert planner_accuracy.score(published_runs.published_run(make_row()), frozenset()).fits


def test_script_predicts_rows_of_another_file(tmp_path):
    rows = [
        make_row(id="a", group="Universit\xe4t"),
        make_row(id="b", hidden=""),
        make_row(id="c", step_time_s="", tflops_per_gpu="", tok_s_per_gpu="6000"),
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
        "step_time_low_s",
        "step_time_high_s",
        "interval_because",
    ]
    assert float(written[0]["predicted_step_time_s"]) > 0
    assert float(written[0]["predicted_tokens_per_s_per_device"]) == pytest.approx(
        64 * 2048 / 16 / float(written[0]["predicted_step_time_s"]), rel=1e-4
    )
    assert written[1]["predicted_step_time_s"] == ""
    assert written[1]["skipped_because"] == "hidden is not given"
