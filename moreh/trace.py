"""Spans of the life of a step for torch.profiler: one for each phase and each collective.

No torch is imported with this module: the command-line tools read the package without it.
"""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def span(name: str, bytes: int | None = None) -> Iterator[None]:
    """A span "moreh::NAME" in the trace of torch.profiler; `bytes` is the size of what a collective moves."""
    from torch.profiler import record_function

    with record_function(f"moreh::{name}", None if bytes is None else f"{bytes} bytes"):
        yield
