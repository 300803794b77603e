"""Temporary environment variables."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def restored_variables(*names: str) -> Iterator[None]:
    """Give these environment variables the values from before, or none, when the context ends."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
