"""The planner against published measurements. What it predicts of programs that it was not fitted to is in docs."""

import statistics
from dataclasses import replace

import numpy as np
import pytest

from moreh.planner.hardware.efficiency import fitted_rows
from tests.helpers.compare import worst
from tests.helpers.planner.published_rows import PUBLISHED_RUNS, planner_accuracy, published_runs, scores

# The platform's own speeds are shown beside the predictions, and neither fitted nor tested.
REFERENCE = "Moreh docs MI250"


@pytest.fixture(scope="module")
def scored():
    fitted = fitted_rows()
    runs = published_runs.usable_runs(published_runs.read_rows(PUBLISHED_RUNS))
    return [planner_accuracy.score(run, fitted) for _, run, _ in runs if run is not None]


def test_most_published_rows_can_be_predicted(scored):
    assert len(scored) >= 346


def test_all_but_the_platforms_own_rows_are_fitted(scored):
    assert {entry.run.group for entry in scored if entry.tested} == {REFERENCE}


def check_step_times(scored):
    """The constants are those of any program, so that they fit none of them as well as its own would."""
    errors = [abs(entry.time_error) for entry in scored if entry.time_error is not None]
    assert len(errors) > 300
    assert statistics.fmean(errors) < 0.12
    on_mi250x = [abs(entry.time_error) for entry in scored if entry.run.group == "LUMI MI250X"]
    assert on_mi250x
    assert worst(on_mi250x) < 0.2


def check_memory(scored):
    errors = [abs(entry.memory_error) for entry in scored if entry.memory_error is not None]
    assert len(errors) > 30
    assert np.median(errors) < 0.06
    assert worst(errors) < 0.6


def check_rankings(scored):
    sweeps = {}
    for entry in scored:
        if entry.run.step_time_s is not None:
            sweeps.setdefault(entry.run.sweep, []).append((entry.prediction.step_time_s, entry.run.step_time_s))
    large = [list(zip(*pairs, strict=True)) for pairs in sweeps.values() if len(pairs) >= 8]
    assert len(large) == 2
    for predicted, measured in large:
        # A NaN would count as a tie.
        assert worst(predicted) < np.inf
        assert scores.kendall_tau(predicted, measured) > 0.55
        assert scores.regret(predicted, measured) < 0.06


def test_step_times_are_close(scored):
    check_step_times(scored)


def test_memory_is_close(scored):
    check_memory(scored)


def test_plans_of_a_sweep_are_ranked_as_measured(scored):
    check_rankings(scored)


def with_factor(entry, factor):
    """The entry with a prediction of `factor` times the step time and the memory."""
    prediction = replace(entry.prediction, step_time_s=factor * entry.prediction.step_time_s)
    return replace(entry, prediction=prediction, memory_gib=factor * entry.memory_gib)


@pytest.mark.parametrize("factor", [5, np.nan])
@pytest.mark.parametrize(("check", "group"), [(check_step_times, "LUMI MI250X"), (check_memory, None)])
def test_checks_notice_a_single_wrong_or_nan_prediction(scored, check, group, factor):
    concerned = [
        index
        for index, entry in enumerate(scored)
        if (entry.memory_error is not None if group is None else entry.run.group == group)
    ]
    for index in (concerned[0], concerned[-1]):
        with pytest.raises(AssertionError):
            check([*scored[:index], with_factor(scored[index], factor), *scored[index + 1 :]])


def test_check_of_rankings_notices_one_time_for_all_and_a_nan(scored):
    def change(entry, step_time_s):
        return replace(entry, prediction=replace(entry.prediction, step_time_s=step_time_s))

    with pytest.raises(AssertionError):
        check_rankings([change(entry, 1.0) for entry in scored])
    largest_sweep = statistics.mode(entry.run.sweep for entry in scored)
    last = max(index for index, entry in enumerate(scored) if entry.run.sweep == largest_sweep)
    with pytest.raises(AssertionError):
        check_rankings([*scored[:last], change(scored[last], np.nan), *scored[last + 1 :]])


def test_predictions_tell_plans_of_the_same_work_apart(scored):
    """A single efficiency would give all of a sweep the same time."""
    sweep = [
        entry for entry in scored if entry.run.training.architecture.name == "GPT 3.6B" and "vTrain" in entry.run.group
    ]
    seconds = {round(entry.prediction.step_time_s, 6) for entry in sweep}
    assert len(seconds) == len(sweep) > 20


def test_kendall_tau_and_regret_of_known_rankings():
    assert scores.kendall_tau([1, 2, 3], [10, 20, 30]) == 1
    assert scores.kendall_tau([1, 2, 3], [30, 20, 10]) == -1
    assert scores.kendall_tau([1, 1, 1], [1, 2, 3]) == 0
    assert scores.kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert scores.regret([1, 2, 3], [12, 10, 11]) == pytest.approx(0.2)


def test_fitted_rows_are_recognized_by_content_and_not_by_id(scored):
    source = next(
        line for line in published_runs.read_rows(PUBLISHED_RUNS) if published_runs.row_digest(line) in fitted_rows()
    )
    empty = dict.fromkeys(("id", "another_column"), "")
    assert not planner_accuracy.score(published_runs.published_run({**source, **empty}), fitted_rows()).tested
    assert planner_accuracy.score(
        published_runs.published_run({**source, "gbs": "", "tok_s_per_gpu": "7"}), fitted_rows()
    ).tested
    assert len({entry.run.digest for entry in scored}) == len(scored)
    assert fitted_rows() == {entry.run.digest for entry in scored if not entry.tested}
