"""The one kind of error that a user's input can cause, shown without a traceback."""

from collections.abc import Sequence


def first_line(error: BaseException) -> str:
    """What an error of a library says, as far as it fits in a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class UserError(Exception):
    """Something the user gave cannot be used. Each problem is one line: the place, what was given, what is allowed."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class Stopped(Exception):
    """The run was asked to end, and has saved what it takes to go on."""
