"""`set_config` and `set_backend_config` of the platform, which have no effect here.

Their names and values are not published. A call says in the log that it changes nothing.
"""

from typing import Any

from moreh.log import logger, set_up_logger


def set_config(name: str, *values: Any, **keywords: Any) -> None:
    """Say that a setting of the platform's driver has no effect here."""
    _log("set_config", name)


def set_backend_config(name: str, *values: Any, **keywords: Any) -> None:
    """Say that a setting of the platform's backend has no effect here."""
    _log("set_backend_config", name)


def _log(function: str, name: object) -> None:
    set_up_logger()
    logger.warning(
        "%s(%r, ...) has no effect: it configures the MoAI Platform's driver, which this package does not have. Use "
        "the options of torch.moreh.option.enable_advanced_parallelization() instead.",
        function,
        name,
    )
