"""A fixed sample of `make conformance`, and the page of the patterns."""

import pytest

from tests.conformance.page import PAGE, page
from tests.conformance.patterns import read_patterns

# On one worker and on two.
SAMPLE = [
    "class-weights",
    "two-calls-one-backward",
    "clipping-by-hand",
    "error-in-a-step",
    "gradient-penalty",
    "gradient-rows-masked",
    "ema-by-hand",
    "llama2-tutorial",
    "gpt-tutorial-lora",
]


@pytest.mark.parametrize("name", SAMPLE)
def test_pattern_comes_out_as_its_entry_says(harness, patterns, name):
    outcomes = list(harness.outcomes(patterns[name], [1, 2]))
    assert [outcome.workers for outcome in outcomes] == [1, 2]
    assert not [outcome.complaint for outcome in outcomes if outcome.complaint]


def test_page_has_the_patterns():
    text = page(read_patterns())
    assert PAGE.read_text(encoding="utf-8") == text, "run `python -m tests.conformance.page`"
