"""moreh-plan --explain: why a plan is not the best one."""

import pytest

from moreh.accelerator.flavors import find_flavor
from moreh.models.describe.from_source import describe
from moreh.planner.cost.prediction import StepBreakdown, predict
from moreh.planner.hardware.cluster import cluster_for_flavor
from moreh.planner.hardware.environment import make_environment
from moreh.planner.plan.notation import parse_plan, plan_text
from moreh.planner.plan.plan import Training
from moreh.planner.report.step_parts import STEP_PARTS, short_overhead
from tests.helpers.planner.plan_tool import LLAMA, STEP, plan_of, search_result, sentences_below_table, table_rows


def test_slower_plan_is_compared_with_the_best_one_by_the_parts_of_a_step(plan, plan_json, model):
    text = "tp4 pp2 dp1 mb1x48 recompute:full"
    content = plan_json(model, "--accelerator", 4, *STEP, "--explain", text)
    training, environment = Training(describe(model), 48, 128), make_environment(cluster_for_flavor(find_flavor("4")))
    asked = predict(parse_plan(text, training, 8), training, environment)
    assert content["asked"]["text"] == text
    assert content["asked"]["step_time_s"] == asked.step_time_s
    assert plan_of(content["best"]) == search_result(model, "4", count=1).best[0].plan
    slower = content["asked"]["step_time_s"] - content["best"]["step_time_s"]
    assert sum(content["differences"].values()) == pytest.approx(slower)
    assert content["missing_bytes"] == 0

    code, out, err = plan(model, "--accelerator", 4, *STEP, "--explain", text, "--wide")
    assert (code, err) == (0, "")
    headers, *rows = table_rows(out)
    assert headers == ["", "This plan", "Best plan"]
    names = [row[0] for row in rows]
    assert {"computation", "recomputation", "pipeline bubble", "optimizer", "step time", "tokens/s"} <= set(names)
    assert {"memory: parameters", "memory: activations", "memory: all"} <= set(names)
    sentences = sentences_below_table(out)
    assert sentences == content["explanation"]
    assert 2 <= len(sentences) <= 5
    worst = max(content["differences"], key=lambda part: content["differences"][part])
    assert sentences[1].startswith(worst.removesuffix("_s").split("_")[0].capitalize())
    assert "more, with " in sentences[1]


def test_best_plan_is_explained_as_such(plan_json, model):
    best = search_result(model, "4", count=1).best[0]
    explanation = plan_json(model, "--accelerator", 4, *STEP, "--explain", plan_text(best.plan))["explanation"]
    assert explanation[0] == "This is the best plan of the search."


def test_faster_plan_names_the_constraint_that_excludes_it(plan_json, model):
    best = search_result(model, "4", count=1).best[0].plan
    choice = "yes" if best.recomputation == "none" else "no"
    options = ("--recompute", choice)
    explanation = plan_json(model, "--accelerator", 4, *STEP, *options, "--explain", plan_text(best))["explanation"]
    assert " less " in explanation[0]
    reason = f"recompute:{best.recomputation} contradicts --recompute {choice}"
    assert explanation[-1] == f"The search did not consider it: {reason}."


def test_slower_plan_names_all_constraints_that_exclude_it(plan_json, model):
    content = plan_json(model, "--accelerator", 4, *STEP, "--stages", 1, "--explain", "cp2 pp2 tp1 dp2")
    assert " more (" in content["explanation"][0]
    assert content["explanation"][-1] == (
        "The search did not consider it: cp2 is above --max-context 1, and pp2 contradicts --stages 1."
    )
    computation = next(line for line in content["explanation"] if line.startswith("Computation"))
    assert "cp2" in computation
    assert "cp1" in computation


def test_plan_that_torch_cannot_run_is_predicted_all_the_same(plan_json):
    """The platform's own plan: 1F1B with fewer micro-batches than stages."""
    model, text = "configs/models/cerebras_gpt_13b.json", "tp1 pp4 dp8 mb1x2 shard:parameters"
    where = ("--accelerator", "4xLarge.2048GB", "--batch-size", 16, "--sequence-length", 1024)
    content = plan_json(model, *where, "--explain", text)
    assert content["asked"]["text"] == text
    assert content["asked"]["step_time_s"] > content["best"]["step_time_s"]
    assert content["explanation"][-1] == (
        "PyTorch cannot run its pipeline schedule: 1f1b needs at least as many micro-batches as stages, and pp4 mb1x2 "
        "has 2 for 4. The figures assume that it could."
    )


def test_plan_that_does_not_fit_says_what_is_missing_and_where(plan_json):
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


@pytest.mark.parametrize("field", STEP_PARTS)
def test_largest_overhead_has_a_short_name(field):
    """Every text that StepBreakdown can give is one of those that a narrow table shortens."""
    breakdown = StepBreakdown(**{name: 90.0 if name == field else 1.0 for name in STEP_PARTS})
    share = 90 / (89 + len(STEP_PARTS))
    expected = "none" if field == "computation_s" else f"{STEP_PARTS[field].short} {share:.0%}"
    assert short_overhead(breakdown.largest_overhead) == expected
