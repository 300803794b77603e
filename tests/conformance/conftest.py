"""The harness of the conformance suite and its patterns, for the tests of this folder."""

import pytest

from tests.conformance.harness import Harness
from tests.conformance.patterns import read_patterns


@pytest.fixture(scope="module")
def harness():
    with Harness() as made:
        yield made


@pytest.fixture(scope="module")
def patterns():
    return {pattern.name: pattern for pattern in read_patterns()}
