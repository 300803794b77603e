"""The patterns of the suite see what the runtime once did wrong without a word."""

import pytest

from tests.conformance.faults import FAULTS
from tests.conformance.harness import compare, judged
from tests.conformance.plans import workers_of


@pytest.fixture(scope="module")
def plain_run(harness, patterns):
    """The run of a pattern without the line, made once."""
    runs = {}

    def run(name):
        if name not in runs:
            runs[name] = harness.run(patterns[name], 1, with_line=False)
        return runs[name]

    return run


@pytest.mark.parametrize("name", FAULTS)
def test_pattern_sees_the_fault(harness, patterns, plain_run, name):
    fault = FAULTS[name]
    pattern, workers = patterns[fault.pattern], workers_of(fault.plan) if fault.plan else 1
    for _ in range(fault.attempts):
        planned = harness.run(pattern, workers, fault.plan or "auto", fault=name)
        outcome = judged(pattern, workers, fault.plan, *compare(plain_run(fault.pattern), planned, pattern.tolerance))
        assert outcome.kind != "failed", outcome
        if outcome.complaint:
            break
    assert outcome.complaint
