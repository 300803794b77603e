"""moreh-plan --calibrate and --compare: measured steps move the predictions, and what is wrong in a file is named."""

import json

import pytest

from tests.conftest import ROOT
from tests.helpers.planner.plan_tool import runner, table_rows, write_model

SWEEP = ROOT / "benchmarks" / "data" / "gpt_3_6b_sweep"
SWEEP_STEP = ("--device", "A100 80GB", "--devices", "64", "--batch-size", "512", "--sequence-length", "2048")
PLACE = ("--device", "H100 80GB", "--devices", "8", "--batch-size", "16", "--sequence-length", "128")
LINE = {"plan": "tp1 pp1 dp8 mb2x1", "batch_size": 16, "sequence_length": 128, "step_time_s": 1.0}


@pytest.fixture
def tool(state_directory, monkeypatch, capsys):
    return runner(monkeypatch, capsys)


def write_lines(directory, *lines):
    path = directory / "measured.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_first_row_of_a_published_sweep_ranks_the_rest(tool):
    def compare(*options):
        code, out, err = tool(
            SWEEP / "config.json", *SWEEP_STEP, "--compare", SWEEP / "measured.jsonl", "--json", *options
        )
        assert (code, err) == (0, "")
        return json.loads(out)["comparison"]

    before, after = compare(), compare("--calibrate", SWEEP / "first_row.jsonl")
    assert [step["calibrated"] for step in after["steps"]].count(True) == 1
    assert after["basis"] == "calibrated with 1 step"
    assert after["mean_error"] < 0.1 < before["mean_error"]
    assert after["kendall_tau"] > 0.85


def test_measured_step_moves_the_search_and_narrows_the_interval(tool, tmp_path):
    model = write_model(tmp_path)

    def best(*options):
        code, out, err = tool(model, *PLACE, "--json", *options)
        assert (code, err) == (0, "")
        content = json.loads(out)
        return content["plans"][0], content["interval"]

    plan, interval = best()
    low, high = interval["step_time_s"]
    assert low < plan["step_time_s"] < high
    assert interval["measured_steps"] == 0
    assert interval["basis"].startswith("not calibrated")
    twice = {**LINE, "plan": plan["text"], "step_time_s": 2 * plan["step_time_s"], "memory_gib": 3.0}
    other = best("--calibrate", write_lines(tmp_path, twice, twice))
    slower, narrower = other
    assert slower["step_time_s"] > 1.3 * plan["step_time_s"]
    assert narrower["step_time_s"][1] / narrower["step_time_s"][0] < high / low
    assert narrower["measured_steps"] == 2
    assert narrower["basis"].startswith("calibrated with 2 steps")
    code, out, _ = tool(model, *PLACE, "--explain", plan["text"], "--calibrate", tmp_path)
    assert code == 0
    assert "on the fullest device; calibrated with 2 steps" in " ".join(out.split())


def test_table_of_a_comparison_has_predicted_and_measured_steps(tool, tmp_path):
    path = write_lines(tmp_path, LINE, {**LINE, "plan": "tp2 pp1 dp4 mb4x1", "step_time_s": 0.5})
    code, out, err = tool(write_model(tmp_path), *PLACE, "--compare", path, columns=140)
    assert (code, err) == (0, "")
    headers, *rows = table_rows(out)
    assert headers == ["#", "Plan", "Predicted", "80% interval", "Measured", "# measured", "Error"]
    assert sorted(row[5] for row in rows) == ["1", "2"]
    assert "2 steps that did not calibrate: mean error" in out


def test_a_line_may_name_its_model_and_devices(tool, tmp_path):
    write_model(tmp_path)
    line = {**LINE, "plan": "dp2 mb8x1", "model": "small.json", "device": "NVIDIA H100 80GB HBM3", "devices": 2}
    path = write_lines(tmp_path, line)
    code, out, err = tool(ROOT / "configs/models/llama3_8b.json", *PLACE, "--calibrate", path)
    assert (code, err) == (0, "")
    assert "calibrated with 1 step" in " ".join(out.split())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "measured.jsonl:2: not a JSON object: give a line such as"),
        ({**LINE, "tokens": 3}, "measured.jsonl:2: unknown key tokens. The keys are plan, batch_size"),
        ({**LINE, "step_time": 3}, "unknown key step_time; did you mean step_time_s"),
        ({"plan": "dp8"}, "measured.jsonl:2: batch_size is missing: give a line such as"),
        ({**LINE, "step_time_s": 0}, "measured.jsonl:2: step_time_s is 0: give a number above 0"),
        ({**LINE, "devices": 2.5}, "measured.jsonl:2: devices is 2.5: give a whole number of at least 1"),
        ({**LINE, "plan": "dp3"}, "measured.jsonl:2: plan: dp3 is for 3 devices, but there are 8"),
        ({**LINE, "device": "H9"}, "measured.jsonl:2: no device 'H9': known devices are"),
        ({**LINE, "device": "this machine"}, "it was measured on the CPU of a machine, which says nothing about H100"),
        ({**LINE, "device": "MI300X"}, "a step measured on MI300X cannot calibrate H100 80GB"),
        ({**LINE, "optimizer": "magic"}, "measured.jsonl:2: optimizer is 'magic': give one of adamw"),
    ],
)
def test_wrong_lines_are_refused_in_one_line(tool, tmp_path, line, message):
    path = write_lines(tmp_path, LINE, line)
    code, out, err = tool(write_model(tmp_path), *PLACE, "--calibrate", path)
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


def test_missing_and_empty_files_are_refused(tool, tmp_path):
    model = write_model(tmp_path)
    code, _, err = tool(model, *PLACE, "--calibrate", tmp_path)
    assert code == 1
    assert "measured.jsonl: there is no such file: a run of the scripts writes measured.jsonl at its end" in err
    code, _, err = tool(model, *PLACE, "--calibrate", write_lines(tmp_path))
    assert code == 1
    assert "it has no measured step: give a line such as" in err
