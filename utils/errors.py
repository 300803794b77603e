"""Errors caused by a user's input, shown as one line without a traceback."""

import importlib.util
import os
import re
from collections.abc import Sequence

# The suffix that libraries in Rust add to an error of the operating system.
_OS_ERROR = re.compile(r"([^:]+) \(os error \d+\)")
EXIT_FAILURE = 1
"""A failure of the machine; another attempt may succeed."""
EXIT_USER_ERROR = 2
EXIT_REQUEUE = 75
"""The run saved before its time limit and should be requeued: EX_TEMPFAIL of sysexits.h."""
EXIT_SIGNAL = 128
"""The run was stopped by a signal; the signal number is added."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class name if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def in_one_line(text: str, characters: int = 300) -> str:
    """A message in one line, truncated to `characters`."""
    return " ".join(text.split())[:characters]


def system_word(error: BaseException) -> str | None:
    """The operating system's message in an I/O error, such as "No space left on device"; None for other errors.

    safetensors and tokenizers raise their own error classes, and pyarrow replaces the system's message.
    """
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno else error.strerror or first_line(error)
    match = _OS_ERROR.search(first_line(error))
    return None if match is None else match[1].strip()


class UserError(Exception):
    """A setting, a file or an argument is invalid.

    Each problem is one line: the place, the value given, the allowed values.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DryRunEnd(Exception):
    """The end of a dry run; the message estimates the whole run."""


class Stopped(Exception):
    """A signal or a time limit stopped the run, which has saved a checkpoint."""

    def __init__(self, message: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(message)


def require_package(name: str, key: str, distribution: str = "") -> None:
    """Raise an error if the package that a setting needs is not installed.

    Args:
        name: the import name of the package.
        key: the setting, for the message.
        distribution: the name on the package index, if different.

    Raises:
        UserError: the package is not installed.
    """
    if importlib.util.find_spec(name) is None:
        distribution = distribution or name
        raise UserError(f"{key}: the package {distribution} is not installed: pip install {distribution}")
