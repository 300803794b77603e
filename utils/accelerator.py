"""Sets up the accelerator and the environment variables for a run."""

import contextlib
import os
from collections.abc import Iterator

from moreh.accelerator.registry import read_registry, switch_model
from moreh.log import logger, set_up_logger
from moreh.options import ENABLE_VARIABLE, HANG_VARIABLE, MAX_RESTARTS_VARIABLE
from utils.config.schema import Config
from utils.environment import restored_variables

WORKERS_VARIABLE = "MOREH_WORKERS"


@contextlib.contextmanager
def accelerator_of(config: Config) -> Iterator[None]:
    """Switch to the accelerator of the settings. While the context is open, the one line obeys the settings.

    Variables of the environment that are set already override the settings.

    Raises:
        AcceleratorError: there is no such accelerator, or a job is running on the current one.
    """
    settings, launch = config.accelerator, config.launch
    with restored_variables(WORKERS_VARIABLE, ENABLE_VARIABLE, MAX_RESTARTS_VARIABLE, HANG_VARIABLE):
        os.environ.setdefault(MAX_RESTARTS_VARIABLE, str(launch.max_restarts))
        os.environ.setdefault(HANG_VARIABLE, str(launch.hang_seconds or 0))
        if settings.workers is not None:
            os.environ.setdefault(WORKERS_VARIABLE, str(settings.workers))
        if settings.advanced_parallelization is None:
            os.environ[ENABLE_VARIABLE] = "0"
        if settings.model is not None:
            _switch(str(settings.model))
        yield


def _switch(model: str) -> None:
    """Switch the current accelerator, and say so where the user had chosen another model.

    In a worker this changes nothing: the process that started the workers has switched the accelerator.
    """
    registry = read_registry()
    before = registry.accelerator(registry.current).flavor.name
    after = switch_model(model).flavor.name
    if after != before:
        set_up_logger()
        logger.info(
            "Switched accelerator %d from %s to %s, as set by accelerator.model; accelerator.model=null keeps the "
            "current model.",
            registry.current,
            before,
            after,
        )
