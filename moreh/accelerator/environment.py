"""The platform's environment variables that concern the accelerator."""

import os

from moreh.errors import OptionError
from moreh.log import logger
from moreh.options import ENABLE_VARIABLE

VISIBLE_DEVICE = "MOREH_VISIBLE_DEVICE"
# Variables of the platform that have no effect here, each with its replacement.
_WITHOUT_EFFECT = {
    "ACCELERATOR_PLATFORM_FLAVOR": "'moreh-switch-model' chooses the accelerator's model",
}


def visible_device(current: int) -> int:
    """The index of the accelerator that this process is to use: that of MOREH_VISIBLE_DEVICE, else the current one.

    Raises:
        OptionError: its value is not an index.
    """
    text = os.environ.get(VISIBLE_DEVICE, "").strip()
    if not text:
        return current
    if not (text.isascii() and text.isdecimal()):
        raise OptionError(
            f"{VISIBLE_DEVICE}={text!r}: expected the index of one accelerator, such as 0; "
            "'moreh-smi device --list' lists them; the current one if unset"
        )
    return int(text)


def warn_of_variables_without_effect() -> None:
    """Log a line for each variable of the platform that is set and changes nothing here."""
    for name, instead in _WITHOUT_EFFECT.items():
        if os.environ.get(name):
            logger.warning("%s=%s has no effect: %s.", name, os.environ[name], instead)


def warn_of_missing_line() -> None:
    """Log a line at the end of a script that relied on the environment for advanced parallelization."""
    if os.environ.get(ENABLE_VARIABLE, "").strip() == "1":
        logger.warning(
            "%s=1 does not replace the line, and the script ran on one device: call "
            "torch.moreh.option.enable_advanced_parallelization() in the script.",
            ENABLE_VARIABLE,
        )
