"""Prepares what a script's one line depends on: the current accelerator, and the environment variables."""

import contextlib
import os
from collections.abc import Iterator

from moreh.accelerator.registry import switch_model
from moreh.options import ENABLE_VARIABLE
from utils.config.schema import AcceleratorSection

WORKERS_VARIABLE = "MOREH_WORKERS"


@contextlib.contextmanager
def accelerator_of(settings: AcceleratorSection) -> Iterator[None]:
    """Switch to the accelerator of the settings. While the context is open, the one line obeys the settings.

    If the environment variable MOREH_WORKERS is set already, it overrides the settings.

    Raises:
        AcceleratorError: there is no such accelerator, or a job is running on the current one.
    """
    variables = (WORKERS_VARIABLE, ENABLE_VARIABLE)
    before = {name: os.environ.get(name) for name in variables}
    try:
        if settings.workers is not None:
            os.environ.setdefault(WORKERS_VARIABLE, str(settings.workers))
        if settings.advanced_parallelization is None:
            os.environ[ENABLE_VARIABLE] = "0"
        if settings.model is not None:
            # In a worker this changes nothing: the process that started the workers has switched the accelerator.
            switch_model(str(settings.model))
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
