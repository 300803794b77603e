"""moreh-plan as a person and as a script use it."""

import json
import re
import sys
import time
from dataclasses import asdict

import pytest

from moreh.accelerator.devices import find_device
from moreh.accelerator.flavors import all_flavors, find_flavor
from moreh.accelerator.registry import switch_model
from moreh.cli import plan as tool
from moreh.planner.cluster import cluster_of_devices, cluster_of_flavor
from moreh.planner.describe import describe
from moreh.planner.implementation import computing_in
from moreh.planner.plan import Plan, Training
from moreh.planner.plan_text import parse_plan, plan_text
from moreh.planner.prediction import predict, setting_of
from moreh.planner.search import search

MODEL = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12, "vocab_size": 4000}
MODEL |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256}
STEP = ("--batch-size", "48", "--sequence-length", "128")
LLAMA = (
    "configs/models/llama3_70b.json",
    "--accelerator",
    "8xLarge.4096GB",
    "--batch-size",
    "512",
    "--sequence-length",
    "1024",
)
PLATFORM_PLAN = "tp1 pp8 dp8 mb1x64 recompute:full shard:parameters"


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(MODEL), encoding="utf-8")
    return str(path)


@pytest.fixture
def plan(state_directory, monkeypatch, capsys):
    """Run the tool in this process; returns its exit code and what it wrote on both streams."""

    def run_tool(*arguments):
        monkeypatch.setattr(sys, "argv", ["moreh-plan", *map(str, arguments)])
        try:
            code = tool.main()
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())

    return run_tool


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
    return search(training, setting_of(cluster_of_flavor(find_flavor(flavor))), restrictions, count)


def test_table_of_the_best_plans(plan, model):
    code, out, err = plan(model, "--accelerator", "xLarge.512GB", *STEP)
    assert (code, err) == (0, "")
    result = searched(model, "xLarge.512GB")
    headers, *rows = cells_of(out)
    assert headers == ["Rank", "Plan", "Memory per device", "Step time", "Tokens/s", "MFU", "Limited by"]
    assert [row[0] for row in rows] == [str(rank) for rank in range(1, 11)]
    assert [row[1] for row in rows] == [plan_text(best.plan) for best in result.best]
    assert [row[6] for row in rows] == [best.parts.limit for best in result.best]
    for row in rows:
        assert re.fullmatch(r"[\d.]+ GiB \(\d+%\)", row[2])
        assert re.fullmatch(r"[\d,.]+ m?s", row[3])
        assert re.fullmatch(r"[\d,]+", row[4])
        assert re.fullmatch(r"[\d.]+%", row[5])
    assert f"{describe(model).parameters:,} parameters" in out
    assert "xLarge.512GB (8 x MI250 GCD) on 1 node" in out
    assert "48 x 128 tokens" in out
    assert f"{result.candidates:,} candidates, {result.possible:,} fit" in out
    assert re.search(r"predictions, not measurements\. .* within \d+% .* \(CDNA2, \d+ runs\)", out)


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
    plans = [plan_of(entry) for entry in plan_json(model, "--accelerator", 4, "--count", 1000, *STEP, *options)["plans"]]
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
    setting = setting_of(cluster_of_devices(find_device("H100 80GB"), 1), computing_in("float32"))
    assert setting.implementation.compute == "float32"
    result = search(Training(describe(model), 48, 128), setting, count=1)
    assert best["float32"]["step_time_s"] == result.best[0].step_time_s > best["bfloat16"]["step_time_s"]
    assert plan_json(model, *where, "--precision", "float8")["precision"] == "float8"


def test_why_a_plan_loses(plan, plan_json, model):
    text = "tp4 pp2 dp1 mb1x48 recompute:full"
    content = plan_json(model, "--accelerator", 4, *STEP, "--explain", text)
    training, setting = Training(describe(model), 48, 128), setting_of(cluster_of_flavor(find_flavor("4")))
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


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_nothing_fits(plan, options):
    model, _, _, *step = LLAMA
    code, out, err = plan(model, "--accelerator", "Small.64GB", *step, *options)
    assert (code, out) == (1, "")
    fitting = []
    for flavor in all_flavors():
        setting = setting_of(cluster_of_flavor(flavor))
        if search(Training(describe(model), 512, 1024), setting, count=1).possible:
            fitting.append(flavor.name)
    assert re.fullmatch(rf"error: no plan fits: .* take {fitting[0]} .*\n", err)

    code, out, err = plan(model, "--device", "H100 80GB", "--devices", 4, *step, "--explain", "tp4")
    assert code == 1
    assert "No other plan fits either." in out
    assert re.fullmatch(r"error: no plan fits: .* take \d+ x H100 80GB, the smallest on which one fits.*\n", err)


def test_nothing_larger_fits(plan, model):
    for where, tried in (
        (("--accelerator", 13), "no larger accelerator would do"),
        (("--device", "H200", "--devices", 1), "no 2 to 64 times as many"),
    ):
        code, out, err = plan(model, *where, *STEP, "--memory-percent", 0.0001)
        assert (code, out) == (1, "")
        assert tried in err


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


def test_accelerators_that_do_not_divide_the_batch_or_do_not_fit(plan, plan_json, model):
    step = ("--batch-size", 7, "--sequence-length", 128)
    content = plan_json(model, *step, "--flavors", "--max-tensor", 1)
    problems = {row["devices"]: row["problem"] for row in content["flavors"]}
    assert problems[1] is None
    assert problems[64] == "no plan divides the batch of 7 over 64 devices"
    assert (
        plan_json(model, *step, "--flavors", "--stages", 3)["flavors"][0]["problem"] == "3 stages cannot be made of 1 devices"
    )
    code, out, _ = plan(model, *step, "--flavors", "--memory-percent", 0.01)
    assert code == 1
    assert "does not fit: at least " in out
    assert "No accelerator is large enough" in out


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


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--batch-size", "0"), 2, "--batch-size: 0: give a whole number from 1 to"),
        (("--batch-size", "-3"), 2, "--batch-size"),
        (("--batch-size", "9" * 30), 2, "give a whole number from 1 to 1,000,000"),
        (("--sequence-length", "1.5"), 2, "--sequence-length: 1.5"),
        (("--stages", "0"), 2, "--stages"),
        (("--stages", "5"), 1, "5 stages cannot be made of 8 devices"),
        (("--stages", "8", "--micro-batches", "5"), 1, "no plan divides the batch of 48 over 8 devices with stages 8, micro-b"),
        (("--batch-size", "7", "--accelerator", "13"), 1, "no plan divides the batch of 7 over 384 devices"),
        (("--recompute", "maybe"), 2, "invalid choice: 'maybe'"),
        (("--memory-percent", "0"), 2, "give a number above 0, at most 100"),
        (("--memory-percent", "nan"), 2, "give a number above 0"),
        (("--memory-percent", "0.001"), 1, "no plan fits"),
        (("--count", "0"), 2, "--count"),
        (("--accelerator", "huge"), 1, "no model 'huge'"),
        (("--device", "K80", "--devices", "4"), 1, "no device 'K80'"),
        (("--device", "H200"), 2, "--device and --devices are given together"),
        (("--devices", "4"), 2, "--device and --devices are given together"),
        (("--device", "H200", "--devices", "4", "--accelerator", "4"), 2, "--device cannot be combined with --accelerator"),
        (("--device", "H200", "--devices", "4", "--flavors"), 2, "--device cannot be combined with --flavors"),
        (("--precision", "int4"), 2, "invalid choice: 'int4'"),
        (("--precision", "float8"), 1, "MI250 GCD does not compute in float8: choose bfloat16, or with --device one of MI300X"),
        (("--flavors", "--explain", "tp4"), 2, "not allowed with argument"),
        (("--flavors", "--plot", "x.png"), 2, "--plot cannot be combined with --flavors"),
        (("--dataset-tokens", "1e9"), 2, "--dataset-tokens needs --flavors"),
        (("--flavors", "--dataset-tokens", "-1"), 2, "give a number above 0"),
        (("--flavors", "--price-per-device-hour", "1"), 2, "--price-per-device-hour needs --dataset-tokens"),
        (("--explain", "tp4 pp3"), 1, "tp4 pp3 does not divide 8 devices"),
        (("--explain", "tq4"), 1, "did you mean one like tp4?"),
        (("--plot", "x.jpg"), 2, "x.jpg: give a file that ends with .png, .svg, .pdf"),
        (("--plot", "/nowhere/x.png"), 1, "/nowhere/x.png"),
    ],
)
def test_refusals(plan, model, options, code, message):
    refused, out, err = plan(model, *STEP, *options)
    assert (refused, out) == (code, "")
    assert message in err
    lines = err.splitlines()
    assert len(lines) == (2 if code == 2 else 1)
    assert lines[-1].startswith("error: " if code == 1 else "moreh-plan: error: ")


def test_models_that_cannot_be_planned(plan, tmp_path):
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    assert "there is no such file" in plan(tmp_path / "none.json", *STEP)[2]
    assert "it is no JSON" in plan(tmp_path / "broken.json", *STEP)[2]
    assert plan(*STEP)[0] == 2


def test_long_sequences_are_a_warning(plan, model):
    code, out, err = plan(model, "--batch-size", 8, "--sequence-length", 512, "--count", 1, "--json")
    assert code == 0
    assert json.loads(out)["plans"]
    assert re.fullmatch(r"warning: small has 256 positions: .*\n", err)


def test_the_real_model_in_a_process_of_its_own(run):
    started = time.perf_counter()
    finished = run(sys.executable, "-m", "moreh.cli.plan", *LLAMA, "--json")
    seconds = time.perf_counter() - started
    assert (finished.returncode, finished.stderr) == (0, "")
    content = json.loads(finished.stdout)
    assert content["model"]["parameters"] == 70_553_706_496
    assert content["plans"][0]["fits"]
    assert seconds < 8  # under a second on a machine that does nothing else

    explained = run(sys.executable, "-m", "moreh.cli.plan", *LLAMA, "--explain", PLATFORM_PLAN).stdout
    assert f"This plan     {PLATFORM_PLAN}\n" in explained
    assert "recompute:full" in explained.split("+\n")[-1]


def test_neither_torch_nor_matplotlib_is_imported(run):
    source = "import sys, moreh.cli.plan as m; m.main(); print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    assert run(sys.executable, "-c", source, *LLAMA).stdout.endswith("\nset()\n")
