"""The platform's log lines: `[info] ...` on standard output, flushed one by one."""

import logging
import sys
from typing import TextIO

from moreh.console.output import say
from moreh.console.printable import printable

logger = logging.getLogger("moreh")


class LevelInBrackets(logging.Formatter):
    """Formats a record as `[info] message`."""

    def format(self, record: logging.LogRecord) -> str:  # noqa: D102
        text = f"[{record.levelname.lower()}] {super().format(record)}"
        return printable(text, kept="\n\t", mark="\ufffd")


class StandardOutputHandler(logging.StreamHandler[TextIO]):
    """Writes to the current `sys.stdout`, so that later redirections are followed."""

    @property
    def stream(self) -> TextIO:  # noqa: D102
        return sys.stdout

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Ignores the stream that StreamHandler's constructor sets."""

    _has_warned = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Say once that lines cannot be written. Logging's own answer is a traceback for each line."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_warned and not isinstance(error, BrokenPipeError):
            self._has_warned = True
            say(f"warning: standard output cannot be written: {error.strerror}")


def set_up_logger() -> None:
    """Give the logger its console handler, unless the program has configured the logger itself."""
    if logger.handlers:
        return
    handler = StandardOutputHandler()
    handler.setFormatter(LevelInBrackets())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
