"""A batch on one worker: its loss and gradients as the fast path computes them, beside a whole forward pass."""

from tests.runtime.engine.test_fast_path import LENGTH, ROWS, batch, differences
from tests.runtime.engine.test_fast_path import TOKENS as MAX_TOKENS

__all__ = ["LENGTH", "MAX_TOKENS", "ROWS", "batch", "differences"]
