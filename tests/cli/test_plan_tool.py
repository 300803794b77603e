"""moreh-plan as a person and as a script use it."""

import json
import os
import re
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from moreh.accelerator.devices import find_device
from moreh.accelerator.flavors import all_flavors, find_flavor
from moreh.accelerator.registry import switch_model
from moreh.cli import plan_command as tool
from moreh.models.describe.from_source import describe
from moreh.planner.cost.prediction import predict
from moreh.planner.hardware.cluster import cluster_for_devices, cluster_for_flavor
from moreh.planner.hardware.environment import make_environment
from moreh.planner.plan.notation import parse_plan, plan_text
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.report.flavor_comparison import recommendation
from moreh.planner.report.report import PLAN_HEADERS
from moreh.planner.search.search import search
from moreh.planner.software_profile import moreh_software
from tests.helpers.plan_tool import LLAMA, STEP, runner, write_model

PLATFORM_PLAN = "tp1 pp8 dp8 mb1x64 recompute:full shard:parameters"


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path)


@pytest.fixture
def plan(state_directory, monkeypatch, capsys):
    return runner(monkeypatch, capsys)


@pytest.fixture
def plan_json(plan):
    """The same with --json; returns the content of a run that succeeds."""

    def run_tool(*arguments):
        code, out, err = plan(*arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return run_tool


def cells_of(text):
    """The cells of the rows of a drawn table, headers first."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def plan_of(content):
    """The plan of a JSON object."""
    return Plan(**{**content["plan"], "stage_layers": tuple(content["plan"]["stage_layers"])})


def searched(model, flavor, restrictions=None, count=10):
    training = Training(describe(model), 48, 128)
    return search(training, make_environment(cluster_for_flavor(find_flavor(flavor))), restrictions, count)


def test_table_of_the_best_plans(plan, model):
    code, out, err = plan(model, "--accelerator", "xLarge.512GB", *STEP)
    assert (code, err) == (0, "")
    result = searched(model, "xLarge.512GB")
    headers, *rows = cells_of(out)
    assert tuple(headers) == PLAN_HEADERS
    assert [row[0] for row in rows] == [str(rank) for rank in range(1, 11)]
    assert [row[1] for row in rows] == [plan_text(best.plan) for best in result.best]
    assert [row[6] for row in rows] == [best.parts.largest_overhead for best in result.best]
    for row in rows:
        assert re.fullmatch(r"[\d.]+ GiB \(\d+%\)", row[2])
        assert re.fullmatch(r"[\d,.]+ m?s", row[3])
        assert re.fullmatch(r"[\d,]+", row[4])
        assert re.fullmatch(r"[\d.]+%", row[5])
    assert f"{describe(model).parameters:,} parameters" in out
    assert "xLarge.512GB (8 x MI250 GCD) on 1 node" in out
    assert "48 x 128 tokens" in out
    assert f"{result.candidates:,} candidates, {result.possible:,} fit" in out
    assert re.search(r"predictions, not measurements\. Step times came out .* published runs", out)


def test_json_has_the_content_of_the_search(plan_json, model):
    content = plan_json(model, "--accelerator", "Large.256GB", "--count", 4, *STEP)
    result = searched(model, "Large.256GB", count=4)
    assert content["search"]["candidates"] == result.candidates
    assert content["search"]["possible"] == result.possible
    assert content["search"]["smallest_bytes"] == result.smallest_bytes
    assert content["accelerator"]["devices"] == 4
    assert content["model"]["parameters"] == describe(model).parameters
    assert [entry["rank"] for entry in content["plans"]] == [1, 2, 3, 4]
    for entry, best in zip(content["plans"], result.best, strict=True):
        assert plan_of(entry) == best.plan
        assert entry["text"] == plan_text(best.plan)
        assert entry["step_time_s"] == best.step_time_s
        assert entry["tokens_per_second"] == best.tokens_per_second
        assert entry["mfu"] == best.mfu
        assert entry["parts"] == asdict(best.parts)
        assert entry["memory_bytes"] == best.memory_bytes == max(rank["total"] for rank in entry["memory_by_rank"])
        assert [rank["optimizer"] for rank in entry["memory_by_rank"]] == [rank.optimizer for rank in best.memory]
        assert sum(entry["parts"].values()) == pytest.approx(entry["step_time_s"])


@pytest.mark.parametrize(
    ("options", "obeys"),
    [
        (("--stages", 2), lambda p: p.pipeline == 2),
        (("--micro-batches", 6), lambda p: p.micro_batches == 6),
        (("--recompute", "yes"), lambda p: p.recomputation != "none"),
        (("--recompute", "no"), lambda p: p.recomputation == "none"),
        (("--shard-parameters", "yes"), lambda p: p.sharding == "parameters"),
        (("--shard-parameters", "no"), lambda p: p.sharding != "parameters"),
        (("--max-tensor", 2), lambda p: p.tensor <= 2),
        (("--max-tensor", 1, "--stages", 4), lambda p: p.tensor == 1 and p.pipeline == 4),
        ((), lambda p: p.context == 1),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_every_plan_obeys_the_restrictions(plan_json, model, options, obeys):
    plans = [
        plan_of(entry) for entry in plan_json(model, "--accelerator", 4, "--count", 1000, *STEP, *options)["plans"]
    ]
    assert len(plans) > 10
    assert all(obeys(plan) and plan.devices == 8 and plan.global_batch_size == 48 for plan in plans)


def test_context_and_memory_restrictions(plan_json, model):
    content = plan_json(model, "--accelerator", 2, "--count", 1000, "--max-context", 2, *STEP)
    assert {entry["plan"]["context"] for entry in content["plans"]} == {1, 2}
    limit = sorted(entry["memory_bytes"] for entry in content["plans"])[50]
    percent = 100 * limit / content["accelerator"]["device_memory_bytes"]
    less = plan_json(model, "--accelerator", 2, "--count", 1000, "--max-context", 2, "--memory-percent", percent, *STEP)
    assert 0 < len(less["plans"]) < len(content["plans"])
    assert all(entry["memory_bytes"] <= less["limit_bytes"] for entry in less["plans"])
    assert less["search"]["candidates"] == content["search"]["candidates"]


def test_the_current_accelerator_is_the_default(plan_json, model):
    switch_model("Medium.128GB")
    assert plan_json(model, *STEP, "--count", 1)["accelerator"]["name"] == "Medium.128GB"
    named = plan_json(model, *STEP, "--count", 1, "--device", "h100 80gb", "--devices", 6)["accelerator"]
    assert (named["name"], named["device"], named["devices"]) == (None, "H100 80GB", 6)


def test_precision_changes_arithmetic_and_bytes(plan_json, model):
    where = ("--device", "H100 80GB", "--devices", 1, "--count", 1, *STEP)
    best = {name: plan_json(model, *where, "--precision", name)["plans"][0] for name in tool.PRECISIONS}
    setting = make_environment(cluster_for_devices(find_device("H100 80GB"), 1), moreh_software("float32"))
    assert setting.software.compute == "float32"
    result = search(Training(describe(model), 48, 128), setting, count=1)
    assert best["float32"]["step_time_s"] == result.best[0].step_time_s > best["bfloat16"]["step_time_s"]
    assert plan_json(model, *where, "--precision", "float8")["precision"] == "float8"


def test_why_a_plan_loses(plan, plan_json, model):
    text = "tp4 pp2 dp1 mb1x48 recompute:full"
    content = plan_json(model, "--accelerator", 4, *STEP, "--explain", text)
    training, setting = Training(describe(model), 48, 128), make_environment(cluster_for_flavor(find_flavor("4")))
    asked = predict(parse_plan(text, training, 8), training, setting)
    assert content["asked"]["text"] == text
    assert content["asked"]["step_time_s"] == asked.step_time_s
    assert plan_of(content["best"]) == searched(model, "4", count=1).best[0].plan
    slower = content["asked"]["step_time_s"] - content["best"]["step_time_s"]
    assert sum(content["differences"].values()) == pytest.approx(slower)
    assert content["missing_bytes"] == 0

    code, out, err = plan(model, "--accelerator", 4, *STEP, "--explain", text)
    assert (code, err) == (0, "")
    headers, *rows = cells_of(out)
    assert headers == ["", "This plan", "Best plan"]
    names = [row[0] for row in rows]
    assert {"computation", "recomputation", "pipeline bubble", "optimizer", "step time", "tokens/s"} <= set(names)
    assert {"memory: parameters", "memory: activations", "memory: all"} <= set(names)
    sentences = out.split("+\n")[-1].splitlines()
    assert sentences == content["explanation"]
    assert 2 <= len(sentences) <= 5
    worst = max(content["differences"], key=lambda part: content["differences"][part])
    assert sentences[1].startswith(worst.removesuffix("_s").split("_")[0].capitalize())
    assert "more, with " in sentences[1]


def test_the_best_plan_is_explained_as_such(plan_json, model):
    best = searched(model, "4", count=1).best[0]
    explanation = plan_json(model, "--accelerator", 4, *STEP, "--explain", plan_text(best.plan))["explanation"]
    assert explanation[0] == "This is the best plan of the search."


def test_a_faster_plan_that_the_restrictions_exclude(plan_json, model):
    best = searched(model, "4", count=1).best[0].plan
    options = ("--recompute", "yes" if best.recomputation == "none" else "no")
    explanation = plan_json(model, "--accelerator", 4, *STEP, *options, "--explain", plan_text(best))["explanation"]
    assert " less " in explanation[0]
    assert explanation[-1] == "The search did not consider it: recomputation is decided otherwise."


def test_a_slower_plan_that_the_restrictions_exclude(plan_json, model):
    content = plan_json(model, "--accelerator", 4, *STEP, "--stages", 1, "--explain", "cp2 pp2 tp1 dp2")
    assert " more (" in content["explanation"][0]
    assert content["explanation"][-1] == (
        "The search did not consider it: cp2 is above the largest context size, 1, and the number of stages is to be 1."
    )
    computation = next(line for line in content["explanation"] if line.startswith("Computation"))
    assert "cp2" in computation
    assert "cp1" in computation


def test_a_plan_that_torch_does_not_run_is_predicted(plan_json):
    """The platform's own plan: 1F1B with fewer micro-batches than stages."""
    model, text = "configs/models/cerebras_gpt_13b.json", "tp1 pp4 dp8 mb1x2 shard:parameters"
    where = ("--accelerator", "4xLarge.2048GB", "--batch-size", 16, "--sequence-length", 1024)
    content = plan_json(model, *where, "--explain", text)
    assert content["asked"]["text"] == text
    assert content["asked"]["step_time_s"] > content["best"]["step_time_s"]
    assert content["explanation"][-1] == (
        "Torch's schedule does not run it, the figures say what it would take: 1f1b needs at least as many micro-batches as "
        "stages, and pp4 mb1x2 has 2 for 4."
    )


def test_a_plan_that_does_not_fit_says_what_is_missing_and_where(plan_json):
    content = plan_json(*LLAMA, "--explain", "tp1 pp16 dp4 mb8x16")
    asked = content["asked"]
    totals = [rank["total"] for rank in asked["memory_by_rank"]]
    rank = totals.index(max(totals))
    kinds = {kind: size for kind, size in asked["memory_by_rank"][rank].items() if kind != "total"}
    assert not asked["fits"]
    assert content["missing_bytes"] == max(totals) - content["limit_bytes"] > 0
    missing = content["explanation"][0]
    assert missing.startswith(f"It does not fit: pipeline rank {rank} needs {max(totals) / 2**30:,.1f} GiB")
    assert f"{content['missing_bytes'] / 2**30:,.1f} GiB more than plans may use" in missing
    assert f"of {max(kinds, key=kinds.get)}" in missing


def test_comparison_of_all_accelerators(plan, plan_json, model):
    content = plan_json(model, *STEP, "--flavors", "--dataset-tokens", "1e9", "--price-per-device-hour", 2.5)
    rows = content["flavors"]
    assert [row["name"] for row in rows] == [flavor.name for flavor in all_flavors()]
    for row in rows:
        assert row["fits"] == (row["best"] is not None) == (row["problem"] is None)
        if row["fits"]:
            best = searched(model, row["name"], count=1).best[0]
            assert plan_of(row["best"]) == best.plan
            assert row["hours"] == pytest.approx(1e9 / best.tokens_per_second / 3600)
            assert row["device_hours"] == pytest.approx(row["hours"] * row["devices"])
            assert row["cost"] == pytest.approx(row["device_hours"] * 2.5)
    fitting = [row for row in rows if row["fits"]]
    assert content["cheapest"] == min(fitting, key=lambda row: row["device_hours"])["name"]
    assert content["fastest"] == min(fitting, key=lambda row: row["hours"])["name"]

    code, out, err = plan(
        model, "--accelerator", 3, *STEP, "--flavors", "--dataset-tokens", "1e9", "--price-per-device-hour", 2.5
    )
    assert (code, err) == (0, "")
    headers, *cells = cells_of(out)
    assert headers[-3:] == ["Hours", "Device-hours", "Cost"]
    assert [row[0] for row in cells if row[0].startswith("*")] == ["* Large.256GB"]
    assert [row[1] for row in cells] == [str(flavor.devices) for flavor in all_flavors()]
    assert [row[2] for row in cells] == ["yes" if row["fits"] else "no" for row in rows]
    assert f"Recommended: {content['cheapest']}; it costs least" in out
    assert content["recommendation"] == out.split("+\n")[-1].splitlines()
    assert "Cost" not in plan(model, *STEP, "--flavors", "--dataset-tokens", "1e9")[1]
    assert "Hours" not in plan(model, *STEP, "--flavors")[1]


def test_accelerators_with_idle_devices_or_too_little_memory(plan, plan_json, model):
    step = ("--batch-size", 7, "--sequence-length", 128)
    rows = {row["devices"]: row for row in plan_json(model, *step, "--flavors", "--max-tensor", 1)["flavors"]}
    assert rows[1]["idle"] is None
    assert rows[64]["idle"].startswith("56 of 64 devices stay idle: no plan divides a batch of 7 x 128 over 64 devices")
    assert rows[64]["devices_in_use"] == rows[64]["best"]["plan"]["pipeline"] == 8
    headers, *cells = cells_of(plan(model, *step, "--flavors", "--max-tensor", 1)[1])
    assert "64 (56 idle)" in [row[headers.index("Devices")] for row in cells]
    first = plan_json(model, *step, "--flavors", "--stages", 3)["flavors"][0]
    assert first["problem"] == "3 stages: the number must divide 1 device and be at most the model's 12 layers"
    code, out, err = plan(model, *step, "--flavors", "--memory-percent", 0.01)
    assert code == 1
    assert "does not fit: at least " in out
    assert re.fullmatch("error: no accelerator is large enough: .*, or a larger --max-context\n", err)


def test_more_device_hours_in_words():
    def row(devices, tokens_per_second):
        flavor = replace(find_flavor("1"), devices=devices)
        return SimpleNamespace(flavor=flavor, best=SimpleNamespace(tokens_per_second=tokens_per_second))

    slow, fast = row(1, 100.0), row(8, 100.0 * 8 / 7.697)
    assert recommendation((slow, fast), None, None)[-1].endswith(
        "; 1.04 times as fast, for 7.7 times the device-hours."
    )
    assert recommendation((slow, row(2, 150.0)), None, None)[-1].endswith(
        "; 1.50 times as fast, for 33.3% more device-hours."
    )


@pytest.mark.parametrize(
    ("name", "options", "start"),
    [
        ("best.png", (), b"\x89PNG"),
        ("many.PNG", ("--stages", 2, "--micro-batches", 48), b"\x89PNG"),
        ("asked.svg", ("--explain", "pp4 zero-bubble"), b"<?xml"),
        ("one.pdf", ("--explain", "dp8"), b"%PDF"),
    ],
)
def test_pictures(plan, plan_json, model, tmp_path, name, options, start):
    path = tmp_path / name
    code, out, err = plan(model, "--accelerator", 4, *STEP, *options, "--plot", path)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].endswith(f"is in {path}")
    assert path.read_bytes().startswith(start)
    assert 5_000 < path.stat().st_size < 1_000_000
    if name.endswith(".png"):
        width, height = (int.from_bytes(path.read_bytes()[at : at + 4], "big") for at in (16, 20))
        assert 1000 < width < 2000
        assert 500 < height < 2000
        assert plan_json(model, "--accelerator", 4, *STEP, "--plot", path)["plot"] == str(path)


def test_long_sequences_are_a_warning(plan, model):
    code, out, err = plan(model, "--batch-size", 8, "--sequence-length", 512, "--count", 1, "--json")
    assert code == 0
    assert json.loads(out)["plans"]
    assert re.fullmatch(r"warning: small has 256 positions: .*\n", err)


def test_the_real_model_in_a_process_of_its_own(run):
    before = os.times()
    finished = run(sys.executable, "-m", "moreh.cli.plan_command", *LLAMA, "--json")
    after = os.times()
    assert (finished.returncode, finished.stderr) == (0, "")
    content = json.loads(finished.stdout)
    assert content["model"]["parameters"] == 70_553_706_496
    assert content["plans"][0]["fits"]
    # Processor time, which a machine that is busy with other things does not stretch as it does the time of a clock.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 8

    explained = run(sys.executable, "-m", "moreh.cli.plan_command", *LLAMA, "--explain", PLATFORM_PLAN).stdout
    assert f"This plan     {PLATFORM_PLAN}\n" in explained
    assert "recompute:full" in explained.split("+\n")[-1]


def test_neither_torch_nor_matplotlib_is_imported(run):
    source = "import sys, moreh.cli.plan_command as m; m.main(); print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    assert run(sys.executable, "-c", source, *LLAMA).stdout.endswith("\nset()\n")
