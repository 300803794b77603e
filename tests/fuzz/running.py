"""Runs a target on many examples."""

from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st


def fuzz(target: Callable[[Any], None], seed: int, examples: int) -> None:
    """Let hypothesis call a target with what draws its examples; raises the error of the smallest that fails."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        print_blob=False,
    )
    @hypothesis.given(st.data())
    def run(data: st.DataObject) -> None:
        target(data.draw)

    run()
