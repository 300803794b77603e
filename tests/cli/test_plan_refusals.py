"""What moreh-plan refuses, what it says where nothing fits, and what would help."""

import json
import re

from moreh.accelerator.flavors import all_flavors
from moreh.models.describe.from_source import describe
from moreh.planner.hardware.cluster import cluster_for_flavor
from moreh.planner.hardware.environment import make_environment
from moreh.planner.plan.plan import Training
from moreh.planner.search.search import search
from tests.helpers.planner.plan_tool import LLAMA, STEP


def test_model_that_cannot_be_read_is_refused(plan, tmp_path):
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    assert "there is no such file" in plan(tmp_path / "none.json", *STEP)[2]
    assert "it is not JSON" in plan(tmp_path / "broken.json", *STEP)[2]
    assert plan(*STEP)[0] == 2


def test_accelerator_that_is_too_small_names_one_that_is_not(plan):
    model, _, _, *step = LLAMA
    code, out, err = plan(model, "--accelerator", "Small.64GB", *step)
    assert (code, out) == (1, "")
    training = Training(describe(model), 512, 1024)
    fitting = next(
        flavor
        for flavor in all_flavors()
        if search(training, make_environment(cluster_for_flavor(flavor)), count=1).possible
    )
    assert re.fullmatch(rf"error: no plan fits: .* take {fitting.name} .*, or give a smaller batch or length\n", err)

    code, out, err = plan(model, "--device", "H100 80GB", "--devices", 4, *step, "--explain", "tp4")
    assert code == 1
    assert "It does not fit: it needs " in out  # one rank: no number of a rank
    assert "No other plan fits either." in out
    assert re.fullmatch(r"error: no plan fits: .* take \d+ x H100 80GB, the smallest on which one fits.*\n", err)


def test_json_has_the_message_where_nothing_fits(plan):
    model, _, _, *step = LLAMA
    for options in ((), ("--explain", "dp1"), ("--flavors", "--memory-percent", 0.1)):
        code, out, err = plan(model, "--accelerator", 1, *step, *options, "--json")
        content = json.loads(out)
        assert (code, err) == (1, f"error: {content['message']}\n")
        if "--flavors" in options:
            assert min(row["smallest_bytes"] for row in content["flavors"]) > 0
            assert content["recommendation"] == []
        elif options:
            assert content["best"] is None
            assert not content["asked"]["fits"]
        else:
            assert content["plans"] == []
            assert content["search"]["smallest_bytes"] > content["limit_bytes"]


def test_message_says_where_nothing_larger_would_do(plan, model):
    for where, tried in (
        (("--accelerator", 13), "no larger accelerator would do"),
        (("--device", "H200", "--devices", 1), "no 2 to 64 times as many"),
    ):
        code, out, err = plan(model, *where, *STEP, "--memory-percent", 0.0001)
        assert (code, out) == (1, "")
        assert tried in err
        assert "fewer restrictions" not in err


def test_options_of_the_message_make_a_plan_fit(plan, model):
    """What the message names is tried: with it there is a plan."""
    where = (model, "--accelerator", 3, "--batch-size", 4, "--sequence-length", 128)
    restricted = (*where, "--memory-percent", 0.04, "--recompute", "no")
    err = plan(*restricted)[2]
    percent = re.search(r"--memory-percent (\d+),", err)[1]
    assert err.endswith("or a smaller batch or length, or fewer restrictions\n")
    assert plan(*where, "--recompute", "no", "--memory-percent", percent)[0] == 0

    long = (
        model,
        "--accelerator",
        13,
        "--batch-size",
        1,
        "--sequence-length",
        65536,
        "--memory-percent",
        0.15,
        "--count",
        1,
    )
    code, _, err = plan(*long, "--max-tensor", 1)
    assert code == 1
    assert "give --memory-percent 7, or a larger --max-context, or " in err
    assert plan(*long, "--max-tensor", 1, "--max-context", 384)[0] == 0


def test_idle_devices_are_named_with_the_options_that_idle_them(plan, model):
    step = ("--batch-size", 7, "--sequence-length", 128, "--max-tensor", 1)
    code, out, err = plan(model, "--accelerator", 6, *step, "--stages", 4, "--wide")
    assert (code, err) == (0, "")
    idle = next(line for line in out.splitlines() if line.startswith("Idle "))
    assert idle.split(maxsplit=1)[1] == (
        "12 of 16 devices: no plan divides a batch of 7 x 128 over 16 devices; there are plans on "
        "all devices without --max-tensor 1, or with a larger --max-context"
    )
    assert " tp1 pp4 dp1 mb" in out
    content = json.loads(plan(model, "--accelerator", 6, *step, "--stages", 4, "--json")[1])
    assert (content["accelerator"]["devices"], content["devices_in_use"]) == (16, 4)
    assert content["idle"].endswith(idle.split(maxsplit=1)[1].split(": ")[1])
    best = content["plans"][0]
    explained = json.loads(
        plan(model, "--accelerator", 6, *step, "--stages", 4, "--explain", best["text"], "--json")[1]
    )
    assert explained["asked"] == explained["best"]
    assert explained["asked"]["step_time_s"] == best["step_time_s"]
    on_all = json.loads(plan(model, "--accelerator", 6, *step, "--explain", "pp4 cp4 dp1", "--json")[1])
    assert on_all["explanation"][-1] == "The search did not consider it: cp4 is above --max-context 1."
    assert "Idle" not in plan(model, "--accelerator", 6, *STEP)[1]
