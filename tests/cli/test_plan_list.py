"""moreh-plan's list of the best plans, as a person and as a script use it."""

import json
import os
import re
import sys
from dataclasses import asdict

import pytest

from moreh.accelerator.devices import find_device
from moreh.accelerator.registry import switch_model
from moreh.cli.plan_options import PRECISIONS
from moreh.models.describe.from_source import describe
from moreh.planner.hardware.cluster import cluster_for_devices
from moreh.planner.hardware.environment import make_environment
from moreh.planner.plan.notation import plan_text
from moreh.planner.plan.plan import Training
from moreh.planner.report.plan_rows import PLAN_COLUMNS
from moreh.planner.search.search import search
from moreh.planner.software_profile import moreh_software
from tests.helpers.planner.plan_tool import LLAMA, STEP, plan_of, search_result, table_rows

PLATFORM_PLAN = "tp1 pp8 dp8 mb1x64 recompute:full shard:parameters"


def test_wide_table_shows_the_best_plans_of_the_search(plan, model):
    code, out, err = plan(model, "--accelerator", "xLarge.512GB", *STEP, "--wide")
    assert (code, err) == (0, "")
    result = search_result(model, "xLarge.512GB")
    headers, *rows = table_rows(out)
    assert headers == [column.header for column in PLAN_COLUMNS]
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
    assert re.search(r"predictions, not measurements\. Predicted step times are .* published runs", out)


def test_json_has_the_content_of_the_search(plan_json, model):
    content = plan_json(model, "--accelerator", "Large.256GB", "--count", 4, *STEP)
    result = search_result(model, "Large.256GB", count=4)
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
def test_every_plan_obeys_the_constraints(plan_json, model, options, obeys):
    plans = [
        plan_of(entry) for entry in plan_json(model, "--accelerator", 4, "--count", 1000, *STEP, *options)["plans"]
    ]
    assert len(plans) > 10
    assert all(obeys(plan) and plan.devices == 8 and plan.global_batch_size == 48 for plan in plans)


def test_max_context_adds_plans_and_memory_percent_removes_those_above(plan_json, model):
    content = plan_json(model, "--accelerator", 2, "--count", 1000, "--max-context", 2, *STEP)
    assert {entry["plan"]["context"] for entry in content["plans"]} == {1, 2}
    limit = sorted(entry["memory_bytes"] for entry in content["plans"])[50]
    percent = 100 * limit / content["accelerator"]["device_memory_bytes"]
    less = plan_json(model, "--accelerator", 2, "--count", 1000, "--max-context", 2, "--memory-percent", percent, *STEP)
    assert 0 < len(less["plans"]) < len(content["plans"])
    assert all(entry["memory_bytes"] <= less["limit_bytes"] for entry in less["plans"])
    assert less["search"]["candidates"] == content["search"]["candidates"]


def test_current_accelerator_is_the_default(plan_json, model):
    switch_model("Medium.128GB")
    assert plan_json(model, *STEP, "--count", 1)["accelerator"]["name"] == "Medium.128GB"
    named = plan_json(model, *STEP, "--count", 1, "--device", "h100 80gb", "--devices", 6)["accelerator"]
    assert (named["name"], named["device"], named["devices"]) == (None, "H100 80GB", 6)


def test_precision_changes_arithmetic_and_bytes(plan_json, model):
    where = ("--device", "H100 80GB", "--devices", 1, "--count", 1, *STEP)
    best = {name: plan_json(model, *where, "--precision", name)["plans"][0] for name in PRECISIONS}
    environment = make_environment(cluster_for_devices(find_device("H100 80GB"), 1), moreh_software("float32"))
    assert environment.software.compute == "float32"
    result = search(Training(describe(model), 48, 128), environment, count=1)
    assert best["float32"]["step_time_s"] == result.best[0].step_time_s > best["bfloat16"]["step_time_s"]
    assert plan_json(model, *where, "--precision", "float8")["precision"] == "float8"


def test_sequences_longer_than_the_models_positions_are_a_warning(plan, model):
    code, out, err = plan(model, "--batch-size", 8, "--sequence-length", 512, "--count", 1, "--json")
    assert code == 0
    assert json.loads(out)["plans"]
    assert re.fullmatch(r"warning: small has 256 positions: .*\n", err)


def test_plans_for_llama_70b_take_seconds_in_a_process_of_their_own(run):
    before = os.times()
    finished = run(sys.executable, "-m", "moreh.cli.plan_command", *LLAMA, "--json")
    after = os.times()
    assert (finished.returncode, finished.stderr) == (0, "")
    content = json.loads(finished.stdout)
    assert content["model"]["parameters"] == 70_553_706_496
    assert content["plans"][0]["fits"]
    # CPU time: unlike wall-clock time, it does not grow on a machine that is busy with other things.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 8

    explained = run(sys.executable, "-m", "moreh.cli.plan_command", *LLAMA, "--explain", PLATFORM_PLAN).stdout
    assert f"This plan     {PLATFORM_PLAN}\n" in explained
    assert "recompute:full" in explained.split("+\n")[-1]


def test_neither_torch_nor_matplotlib_is_imported(run):
    source = (
        "import sys, moreh.cli.plan_command as m; m.main(); "
        "print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    assert run(sys.executable, "-c", source, *LLAMA).stdout.endswith("\nset()\n")


def test_adapters_are_trained_with_all_else_frozen(plan, plan_json):
    step = ("--device", "H100 80GB", "--devices", 8, "--batch-size", 64, "--sequence-length", 4096, "--count", 1)
    llama = ("configs/models/llama3_8b.json", *step)
    full, lora = plan_json(*llama), plan_json(*llama, "--lora", 16)
    some = plan_json(*llama, "--lora", 16, "--lora-targets", "q_proj", "self_attn.v_proj")
    trained = [content["model"]["trainable_parameters"] for content in (full, lora, some)]
    # q_proj is 4096 -> 4096, v_proj is 4096 -> 1024, in 32 layers.
    assert trained == [8_030_261_248, 41_943_040, 32 * 16 * (4096 + 4096 + 4096 + 1024)]
    assert lora["model"]["parameters"] == trained[0] + trained[1]
    times = [content["plans"][0]["step_time_s"] for content in (full, lora, some)]
    assert times[0] > times[1] > times[2] > 0.6 * times[0]
    code, out, _ = plan(*llama, "--lora", 16)
    assert code == 0
    assert "llama3_8b, 8,072,204,288 parameters, 41,943,040 of them trained\n" in out


def test_state_of_the_optimizer_is_planned(plan, plan_json, model):
    where = (model, "--device", "H100 80GB", "--devices", 1, *STEP, "--count", 1)
    contents = [plan_json(*where, "--optimizer", name) for name in ("adamw", "muon", "sgd")]
    adamw, muon, sgd = (content["plans"][0]["memory_by_rank"][0]["optimizer"] for content in contents)
    parameters = contents[0]["model"]["parameters"]
    assert (adamw, sgd) == (8 * parameters, 0)
    assert 4 * parameters < muon < 8 * parameters
    assert contents[1]["optimizer"]["name"] == "muon"
    code, out, _ = plan(*where, "--optimizer", "sgd", "--momentum")
    assert code == 0
    assert re.search(r"^Optimizer +sgd, 1 values of state for each trained weight$", out, re.M)
