"""moreh-plan's output fits the terminal."""

import re

import pytest

from moreh.accelerator.flavors import find_flavor
from moreh.models.describe.from_source import describe
from moreh.planner.hardware.cluster import cluster_for_flavor
from moreh.planner.hardware.environment import make_environment
from moreh.planner.plan.notation import parse_plan, plan_text
from moreh.planner.plan.plan import Training
from moreh.planner.report.flavor_comparison import compare_flavors
from moreh.planner.report.flavor_report import flavor_table_forms
from moreh.planner.report.plan_rows import plan_table_forms
from moreh.planner.search.constraints import Constraints
from moreh.planner.search.request import Request
from moreh.planner.search.search import search
from moreh.tables import draw_widest
from tests.helpers.planner.plan_tool import LLAMA, STEP, sentences_below_table, table_rows

MODES = {
    "list": (),
    "explain": ("--explain", "tp1 pp8 dp8 mb1x64 recompute:full shard:parameters"),
    "flavors": ("--flavors", "--dataset-tokens", "1e9"),
    "flavors with costs": ("--flavors", "--dataset-tokens", "1e9", "--price-per-device-hour", "3"),
}
# Deep models, whose plans have the longest notations, and one of experts.
MODELS = ("llama3_70b", "llama3_405b", "gpt2_xl", "mixtral_8x7b")
# Of each model another accelerator takes seconds to plan: the deepest one, and the one of experts.
MODELS_ON_ALL_ACCELERATORS = ("llama3_405b", "mixtral_8x7b")

pytestmark = pytest.mark.usefixtures("flavors_compared_once")


def longest_line(text):
    return max(map(len, text.splitlines()))


def request_for(name):
    """A step of a model on the largest accelerator."""
    flavor = find_flavor("48xLarge.24576GB")
    training = Training(describe(f"configs/models/{name}.json"), 768, 1024)
    return Request(training, make_environment(cluster_for_flavor(flavor)), Constraints(), flavor)


@pytest.mark.parametrize("columns", [100, 80])
@pytest.mark.parametrize("mode", MODES)
def test_output_for_llama_70b_fits_the_terminal(plan, mode, columns):
    code, out, err = plan(*LLAMA, *MODES[mode], columns=columns)
    assert (code, err) == (0, "")
    assert longest_line(out) <= columns


@pytest.mark.parametrize("name", MODELS)
def test_narrow_table_of_plans_keeps_rank_plan_memory_time_and_speed(name):
    request = request_for(name)
    result = search(request.training, request.environment)
    forms = plan_table_forms(request, result)
    for width in range(56 + MODELS.index(name), 260, len(MODELS)):  # each width for one of the models
        text = draw_widest(forms, width)
        headers, *rows = table_rows(text)
        assert longest_line(text) <= width
        assert {"#", "Plan", "Step time", "Tokens/s"} < set(headers)
        assert headers[2].startswith("Memory")
        assert [row[0] for row in rows] == [str(rank) for rank in range(1, 11)]
        if width >= 80:  # a narrower table may break a plan inside one of its pieces
            plans = [parse_plan(row[1], request.training, request.flavor.devices) for row in rows]
            assert plans == [best.plan for best in result.best]


@pytest.mark.parametrize("name", MODELS_ON_ALL_ACCELERATORS)
def test_narrow_table_of_accelerators_keeps_plan_speed_and_cost(name):
    request = request_for(name)
    rows = compare_flavors(request)
    for tokens, price, narrowest in ((None, None, 60), (1e9, None, 72), (1e9, 3.0, 80), (1e15, 1e6, 100)):
        forms = flavor_table_forms(request, rows, tokens, price)
        first = narrowest + 4 * MODELS_ON_ALL_ACCELERATORS.index(name)
        for width in range(first, 300, 8):  # each fourth width for one of the models
            text = draw_widest(forms, width)
            headers, *cells = table_rows(text)
            assert longest_line(text) <= width
            assert {"Accelerator", "Best plan", "Tokens/s"} <= set(headers)
            assert ("Hours" in headers) == (tokens is not None)
            assert ("Cost" in headers) == (price is not None)
            if width >= 80 and price != 1e6:  # else a plan may be broken inside one of its pieces
                shown = [row[headers.index("Best plan")] for row in cells]
                assert shown == [plan_text(row.best.plan) if row.best else row.problem for row in rows]


@pytest.mark.parametrize("mode", ["list", "explain", "flavors with costs"])
def test_wide_output_is_that_of_the_widest_terminal(plan, mode):
    def without_seconds(text):
        return re.sub(r"fit in memory, [\d.]+ s", "fit in memory", text)

    wide = plan(*LLAMA, *MODES[mode], "--wide", columns=80)[1]
    assert without_seconds(wide) == without_seconds(plan(*LLAMA, *MODES[mode], columns=1000)[1])
    assert longest_line(wide) > 100


def test_wrapped_sentences_have_the_words_of_unbroken_ones(plan):
    wide = sentences_below_table(plan(*LLAMA, *MODES["explain"], "--wide")[1])
    narrow = sentences_below_table(plan(*LLAMA, *MODES["explain"], columns=60)[1])
    assert len(narrow) > len(wide)
    assert " ".join(narrow) == " ".join(wide)


def test_width_is_100_where_there_is_neither_a_terminal_nor_columns(run, environment):
    environment.pop("COLUMNS", None)
    finished = run("moreh-plan", *LLAMA)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert 80 < longest_line(finished.stdout) <= 100


def test_error_stays_on_one_line(plan, model):
    code, _, err = plan(model, "--accelerator", 1, *STEP, "--memory-percent", 0.0001, columns=60)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert len(err) > 100


@pytest.mark.parametrize("columns", [100, 80])
def test_help_fits_the_terminal_and_describes_notation_and_devices(plan, columns):
    code, out, _ = plan("--help", columns=columns)
    assert code == 0
    for piece in ("tp4 pp8 dp2 cp2", "mb1x64", "recompute:selective", "shard:optimizer", "layers:9,10x6,11"):
        assert piece in out
    assert "H100 80GB" in out
    assert "this machine" in out
    assert out.count("  moreh-plan configs/models/") == 5
    assert longest_line(out) <= columns
