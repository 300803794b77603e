"""Waits for an accelerator that another process uses, or raises an error with MOREH_WAIT=0."""

import os
import time
from collections.abc import Callable
from typing import TypeVar

from moreh.console.printable import printable
from moreh.errors import AcceleratorBusyError, OptionError
from moreh.log import logger

VARIABLE = "MOREH_WAIT"
SECONDS_BETWEEN_ATTEMPTS = 1.0

Result = TypeVar("Result")


def waits_for_accelerator() -> bool:
    """The value of MOREH_WAIT.

    Raises:
        OptionError: its value is neither 0 nor 1.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if text not in ("", "0", "1"):
        raise OptionError(
            f"{VARIABLE}={text!r}: expected 0 (raise an error if the accelerator is busy) or 1 (wait for it); 1 if "
            "unset"
        )
    return text != "0"


def when_free(start: Callable[[], Result]) -> Result:
    """The result of `start` once the accelerator is free. Logs the waiting. Polls, so a switch is noticed.

    Raises:
        AcceleratorBusyError: MOREH_WAIT=0, and another process is using the accelerator.
    """
    waits, is_first = waits_for_accelerator(), True
    while True:
        try:
            return start()
        except AcceleratorBusyError as busy:
            if not waits:
                raise
            if is_first:
                warn_of_waiting(busy)
        is_first = False
        time.sleep(SECONDS_BETWEEN_ATTEMPTS)


def warn_of_waiting(busy: AcceleratorBusyError | str) -> None:
    """The log line of a process that begins to wait."""
    reason = str(busy).partition(" and cannot be ")[0]
    logger.warning(
        "%s. This process waits until it is free (%s=0 raises an error instead).", printable(reason), VARIABLE
    )
