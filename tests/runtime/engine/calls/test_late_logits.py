"""Logits that a script reads after the optimizer's step are those of the call."""

import pytest

from tests.helpers.models.families import PP_TP
from tests.helpers.sharded import late_reads
from tests.helpers.workers import run_on_workers
from tests.runtime.engine.calls.test_own_losses import PLANS

TOO_LATE = "read them before the optimizer's step"


def on_workers(function, *arguments):
    """The results of the four ranks."""
    return run_on_workers(function, [arguments], size=4)[0]


@pytest.mark.parametrize(
    ("plan", "accumulation"), [("pp-tp", 1), ("pp-sharded", 2), ("tp-sharded", 1), ("dp-optimizer", 1)]
)
def test_logits_are_those_before_the_step(plan, accumulation):
    for differences in on_workers(late_reads.compare, "llama", PLANS[plan], accumulation):
        assert max(differences) < 1e-9


def test_comparison_finds_logits_of_changed_weights():
    for of_logits, _ in on_workers(late_reads.compare_without_exchange, "llama", PP_TP):
        assert of_logits > 1e-3


def test_what_cannot_be_read_is_said():
    for said in on_workers(late_reads.what_is_said, PP_TP):
        assert TOO_LATE in said["changed inputs"]
        assert TOO_LATE in said["changed by hand"]
        assert said["gradients after a step"] is False


def test_only_the_first_step_keeps_weights():
    assert all(TOO_LATE in said for said in on_workers(late_reads.second_step, PP_TP))


def test_step_of_another_model_is_not_the_first():
    assert max(on_workers(late_reads.after_the_step_of_another_model, PP_TP)) < 1e-9


def test_ranks_refuse_together_where_one_has_no_memory():
    assert all(TOO_LATE in said for said in on_workers(late_reads.without_memory, PP_TP))
