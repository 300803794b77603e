"""Errors that a user's input causes. They are shown as lines, without a traceback."""

import importlib.util
from collections.abc import Sequence


def first_line(error: BaseException) -> str:
    """The first line of a library's error, or its class name where it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
    """The run was asked to stop by a signal, and has saved what it had done."""

    def __init__(self, message: str, signal_number: int) -> None:
        self.signal_number = signal_number
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
