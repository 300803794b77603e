"""Errors caused by a user's input, shown as one line without a traceback."""

import importlib.util
import os
import re
from collections.abc import Sequence

# How libraries in Rust end what the operating system says.
_OS_ERROR = re.compile(r"([^:]+) \(os error \d+\)")
EXIT_FAILURE = 1
"""The machine has failed the run, which may go well another time."""
EXIT_USER_ERROR = 2
EXIT_REQUEUE = 75
"""A run has saved before its time limit, and wants to be started again: EX_TEMPFAIL of sysexits.h."""
EXIT_SIGNAL = 128
"""A run was stopped by a signal, whose number is added."""


def first_line(error: BaseException) -> str:
    """The first line of a library's error, or its class name where it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def in_one_line(text: str, characters: int = 300) -> str:
    """A library's message in one line, without what is beyond so many characters."""
    return " ".join(text.split())[:characters]


def system_word(error: BaseException) -> str | None:
    """What the operating system says in an error of reading or writing, such as a full disk; None in other errors.

    safetensors and tokenizers raise errors of their own, and pyarrow puts a sentence in the place of the system's.
    """
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno else error.strerror or first_line(error)
    match = _OS_ERROR.search(first_line(error))
    return None if match is None else match[1].strip()


class UserError(Exception):
    """A setting, a file or an argument cannot be used.

    Each problem is one line: where it is, what was given, what is allowed.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DryRunEnd(Exception):
    """A dry run has seen enough; the message says what the run would take."""


class Stopped(Exception):
    """The run was asked to stop by a signal or a time limit, and has saved what it had done."""

    def __init__(self, message: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(message)


def require_package(name: str, key: str, distribution: str = "") -> None:
    """Refuse a setting, or what else `key` names, if the package that it needs is not installed.

    Args:
        name: by which it is imported.
        key: what needs it.
        distribution: by which it is installed, if that is another name.

    Raises:
        UserError: the package is not installed.
    """
    if importlib.util.find_spec(name) is None:
        distribution = distribution or name
        raise UserError(f"{key}: the package {distribution} is not installed: pip install {distribution}")
