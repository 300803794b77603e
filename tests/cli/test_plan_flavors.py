"""moreh-plan --flavors: the same training on every accelerator."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from moreh.accelerator.flavors import all_flavors, find_flavor
from moreh.planner.report.flavor_comparison import FlavorPlan
from moreh.planner.report.flavor_report import recommendation
from tests.helpers.planner.plan_tool import STEP, plan_of, search_result, sentences_below_table, table_rows


@pytest.mark.usefixtures("flavors_compared_once")
def test_every_accelerator_has_its_best_plan_and_the_cheapest_is_recommended(plan, plan_json, model):
    content = plan_json(model, *STEP, "--flavors", "--dataset-tokens", "1e9", "--price-per-device-hour", 2.5)
    rows = content["flavors"]
    assert [row["name"] for row in rows] == [flavor.name for flavor in all_flavors()]
    for row in rows:
        assert row["fits"] == (row["best"] is not None) == (row["problem"] is None)
        if row["fits"]:
            best = search_result(model, row["name"], count=1).best[0]
            assert plan_of(row["best"]) == best.plan
            assert row["hours"] == pytest.approx(1e9 / best.tokens_per_second / 3600)
            assert row["device_hours"] == pytest.approx(row["hours"] * row["devices"])
            assert row["cost"] == pytest.approx(row["device_hours"] * 2.5)
    fitting = [row for row in rows if row["fits"]]
    assert content["cheapest"] == min(fitting, key=lambda row: row["device_hours"])["name"]
    assert content["fastest"] == min(fitting, key=lambda row: row["hours"])["name"]

    code, out, err = plan(
        model,
        "--accelerator",
        3,
        *STEP,
        "--flavors",
        "--dataset-tokens",
        "1e9",
        "--price-per-device-hour",
        2.5,
        "--wide",
    )
    assert (code, err) == (0, "")
    headers, *cells = table_rows(out)
    assert headers[-3:] == ["Hours", "Device-hours", "Cost"]
    assert [row[0] for row in cells if row[0].startswith("*")] == ["* Large.256GB"]
    assert [row[1] for row in cells] == [str(flavor.devices) for flavor in all_flavors()]
    assert [row[2] for row in cells] == ["yes" if row["fits"] else "no" for row in rows]
    assert f"Recommended: {content['cheapest']}; it costs least" in out
    assert content["recommendation"] == sentences_below_table(out)
    assert "Cost" not in plan(model, *STEP, "--flavors", "--dataset-tokens", "1e9", "--wide")[1]
    assert "Hours" not in plan(model, *STEP, "--flavors", "--wide")[1]


def test_idle_devices_and_missing_memory_are_named(plan, plan_json, model):
    step = ("--batch-size", 7, "--sequence-length", 128)
    rows = {row["devices"]: row for row in plan_json(model, *step, "--flavors", "--max-tensor", 1)["flavors"]}
    assert rows[1]["idle"] is None
    assert rows[64]["idle"].startswith("56 of 64 devices stay idle: no plan divides a batch of 7 x 128 over 64 devices")
    assert rows[64]["devices_in_use"] == rows[64]["best"]["plan"]["pipeline"] == 8
    headers, *cells = table_rows(plan(model, *step, "--flavors", "--max-tensor", 1)[1])
    assert "64 (56 idle)" in [row[headers.index("Devices")] for row in cells]
    first = plan_json(model, *step, "--flavors", "--stages", 3)["flavors"][0]
    assert first["problem"] == "3 stages: the number must divide 1 device and be at most the model's 12 layers"
    code, out, err = plan(model, *step, "--flavors", "--memory-percent", 0.01)
    assert code == 1
    assert "does not fit: needs " in out
    assert re.fullmatch("error: no accelerator is large enough: .*, or a larger --max-context\n", err)


def test_recommendation_says_more_device_hours_in_percent_or_as_a_multiple():
    def row(devices, tokens_per_second):
        flavor = replace(find_flavor("1"), devices=devices)
        return FlavorPlan(flavor, SimpleNamespace(tokens_per_second=tokens_per_second))

    slow, fast = row(1, 100.0), row(8, 100.0 * 8 / 7.697)
    assert recommendation((slow, fast), None, None)[-1].endswith(
        "; 1.04 times as fast, for 7.7 times the device-hours."
    )
    assert recommendation((slow, row(2, 150.0)), None, None)[-1].endswith(
        "; 1.50 times as fast, for 33.3% more device-hours."
    )
