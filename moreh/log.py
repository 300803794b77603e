"""The platform's log lines: `[info] ...` on standard output, flushed one by one."""

import logging
import sys
from typing import TextIO

logger = logging.getLogger("moreh")


class LevelInBrackets(logging.Formatter):
    """Formats a record as `[info] message`."""

    def format(self, record: logging.LogRecord) -> str:  # noqa: D102
        return f"[{record.levelname.lower()}] {super().format(record)}"


class StandardOutputHandler(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stdout` is at the moment of writing, so that later redirections are followed."""

    @property
    def stream(self) -> TextIO:  # noqa: D102
        return sys.stdout

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Ignores the stream that StreamHandler's constructor sets."""


def set_up_logger() -> None:
    """Give the logger its console handler, unless the program has configured the logger itself."""
    if logger.handlers:
        return
    handler = StandardOutputHandler()
    handler.setFormatter(LevelInBrackets())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
