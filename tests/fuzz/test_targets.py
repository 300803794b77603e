"""A few examples of each target of `make fuzz`, always the same; and a target that fails is seen to fail."""

import pytest

from tests.fuzz.running import fuzz
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_target_finds_nothing(target, state_directory):
    fuzz(target, seed=0, examples=15)


def test_error_without_a_line_is_found():
    from hypothesis import strategies as st

    def fails(draw):
        if draw(st.integers(0, 100)) > 50:
            raise KeyError("x")

    with pytest.raises(KeyError):
        fuzz(fails, seed=0, examples=50)
