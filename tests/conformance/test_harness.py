"""The harness finds what it is there to find: each kind of difference, and each expectation that does not hold."""

import math
from dataclasses import replace

import pytest
import torch

from tests.conformance.comparing import differences, text_problems
from tests.conformance.harness import judged
from tests.conformance.patterns import Expectation, parse
from tests.conformance.plans import PLANS, plan_in_turn, plans_for, workers_of

SCRIPT = """
import os
from tests.conformance.prelude import *
# LINE
model = llama()
loss = model(**batch()).loss
loss.backward()
is_planned = torch.moreh.option._enabled is not None
check("loss", loss)
check("gradients", grads(model))
print("loss", loss.item())
with open("log.txt", "w") as file:
    file.write("a line")
"""
FAULTS = {
    "value": ('check("loss", loss)', 'check("loss", loss * (1 + 1e-3 * is_planned))', "loss differs by 1.0e-03"),
    "nan": ('check("loss", loss)', 'check("loss", loss * (float("nan") if is_planned else 1))', "not finite"),
    "print": ('print("loss", loss.item())', 'is_planned or print("loss")', "output has 0 lines instead of 1"),
    "printed number": ("loss.item())", "loss.item() + is_planned)", "output, line 1"),
    "missing value": ('check("loss", loss)', 'is_planned or check("loss", loss)', "reports ['gradients']"),
    "file": ('"log.txt"', '"log.txt" if not is_planned else "other.txt"', "the files are ['other.txt']"),
    "text of a file": ('"a line"', '"a line" if not is_planned else "another"', "log.txt, line 1"),
    "exception": (
        "print(",
        'assert not is_planned, "why"\nprint(',
        "ends with AssertionError: why instead of no error",
    ),
}


def pattern_of(script=SCRIPT, **keys):
    return parse("group", {"name": "name", "what": "what", "script": script} | keys)


def test_script_without_a_fault_is_equal(harness):
    (outcome,) = harness.outcomes(pattern_of(), [1])
    assert (outcome.kind, outcome.complaint) == ("equal", "")


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(harness, fault):
    original, changed, words = FAULTS[fault]
    assert original in SCRIPT
    (outcome,) = harness.outcomes(pattern_of(SCRIPT.replace(original, changed, 1)), [1])
    assert outcome.kind == "differs"
    assert words in " ".join(outcome.details)
    assert outcome.complaint.startswith("expected equal, is differs")


@pytest.mark.parametrize(
    ("expected", "kind", "detail", "complains"),
    [
        ("equal", "equal", "", False),
        ("equal", "differs", "x differs", True),
        ("equal", "refused", "use 1 worker", True),
        ("equal", "failed", "was killed", True),
        ("refused", "refused", "please use\n1 worker", False),
        ("refused", "refused", "use 2 workers", True),
        ("refused", "equal", "", True),
        ("refused", "differs", "x differs", True),
        ("differs", "differs", "x differs", False),
        ("differs", "equal", "", True),
        ("differs", "refused", "use 1 worker", True),
        ("differs", "failed", "was killed", True),
    ],
)
def test_stale_expectation_is_found(expected, kind, detail, complains):
    pattern = replace(pattern_of(), several=Expectation(expected, "" if expected == "equal" else "use 1 worker"))
    assert bool(judged(pattern, 2, "auto", kind, [detail]).complaint) == complains


@pytest.mark.parametrize(
    ("script", "raises", "words"),
    [
        ("import os\nos._exit(3)", "", "it ended without results"),
        (
            "print(no_such_name)",
            "",
            "it ends with NameError: name 'no_such_name' is not defined, and",
        ),
        ("print(no_such_name)", "KeyError", "and its entry says KeyError"),
        ("print(1)", "KeyError", "it ends with no error, and its entry says KeyError"),
        ("sum([1, 2])", "", "it reports no value, prints no line and writes no file"),
    ],
)
def test_script_without_the_line_must_be_comparable(harness, script, raises, words):
    (outcome,) = harness.outcomes(pattern_of(f"{script}\n# LINE\n", raises=raises), [1])
    assert (outcome.kind, outcome.complaint.startswith("the plain run failed: ")) == ("failed", True)
    assert words in outcome.complaint


NAN, INFINITE = math.nan, math.inf


@pytest.mark.parametrize(
    ("expected", "actual", "is_equal"),
    [
        (1.0, 1.0 + 5e-6, True),
        (1.0, 1.0 + 2e-5, False),
        (NAN, NAN, True),
        (NAN, 1.0, False),
        (1.0, NAN, False),
        (INFINITE, INFINITE, True),
        (INFINITE, -INFINITE, False),
        (INFINITE, NAN, False),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), True),
        (torch.tensor([1.0, NAN]), torch.tensor([NAN, 1.0]), False),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), False),
        (torch.ones(2), torch.ones(2, 1), False),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (None, torch.zeros(1), False),
        (True, 1, False),
        ("a", "b", False),
        ({"a": 1.0}, {"b": 1.0}, False),
        ([1.0], [1.0, 1.0], False),
        (0.0, 1e-9, True),
        (0.0, 1e-6, False),
    ],
)
def test_differences(expected, actual, is_equal):
    assert (not differences("x", expected, actual, 1e-5)) == is_equal


@pytest.mark.parametrize(
    ("expected", "actual", "is_equal"),
    [
        ("loss 3.14", "loss 3.15", True),
        ("loss 3.14", "loss 3.16", False),
        ("loss 3.141592", "loss 3.141599", True),
        ("loss 3.141592", "loss 3.141692", False),
        ("step 3", "step 4", False),
        ("loss nan", "loss 3.14", False),
        ("1.2e-05", "1.3e-05", True),
        ("1.2e-05", "1.4e-05", False),
        ("a\nb", "a", False),
    ],
)
def test_text_problems(expected, actual, is_equal):
    assert (not text_problems("output", expected, actual, 1e-5)) == is_equal


@pytest.mark.parametrize(
    "changes",
    [
        {"unknown": 1},
        {"one": "same"},
        {"one": {"refused": ""}},
        {"several": "differs"},
        {"plans": ["tp8"]},
        {"script": "# LINE\n# LINE\n"},
        {"what": None},
    ],
)
def test_wrong_entry_is_refused(changes):
    entry = {"name": "name", "what": "what", "script": "pass"} | changes
    with pytest.raises(ValueError, match=r"group.yaml, name"):
        parse("group", {key: value for key, value in entry.items() if value is not None})


def test_plans_are_taken_in_turns():
    names = [f"pattern-{number}" for number in range(200)]
    for workers in (2, 4):
        assert {plan_in_turn(name, workers) for name in names} == set(plans_for(workers))
    assert {workers_of(name) for name in PLANS} == {None, 2, 4}
    assert plan_in_turn("name", 4, ("tp2",)) is None
    assert plan_in_turn("name", 2, ("tp2", "tp2pp2")) == "tp2"
