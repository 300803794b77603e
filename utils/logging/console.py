"""The lines of a run, its own and those of moreh: on the console at once, and in a file as soon as there is one."""

import contextlib
import logging
import logging.handlers
import sys
from pathlib import Path

from tqdm import tqdm

from moreh.log import LevelInBrackets, set_up_logger
from moreh.log import logger as moreh_logger

train_logger = logging.getLogger("train")


class KeptLines(logging.handlers.MemoryHandler):
    """Keeps the lines until there is a file for them."""

    def __init__(self) -> None:
        super().__init__(capacity=sys.maxsize, flushLevel=logging.CRITICAL + 1, flushOnClose=False)

    def write_to(self, path: Path) -> None:
        """Write what was kept, and all that follows, to this file.

        Raises:
            OSError: it cannot be made.
        """
        file = logging.FileHandler(path, encoding="utf-8", errors="replace")
        file.setFormatter(_FileFormatter())
        self.setTarget(file)
        self.flushLevel = logging.NOTSET  # what was kept goes out with the next line

    def end(self) -> None:
        """Take no more lines, and close the file."""
        for logger in (train_logger, moreh_logger):
            logger.removeHandler(self)
        if self.target is not None:
            self.flush()
            self.target.close()
        self.close()


def keep_lines() -> KeptLines:
    """Show all lines on the console from now on, and keep them for the file of the run.

    If that is done already, by a script that has started the accelerator before its log was open, nothing changes.
    """
    kept = next((handler for handler in train_logger.handlers if isinstance(handler, KeptLines)), None)
    if kept is not None:
        return kept
    kept = KeptLines()
    train_logger.setLevel(logging.INFO)
    train_logger.propagate = False
    set_up_logger()
    for logger, formatter in ((train_logger, logging.Formatter("%(message)s")), (moreh_logger, LevelInBrackets())):
        console = _ConsoleHandler()
        console.setFormatter(formatter)
        logger.handlers.clear()
        logger.addHandler(console)
        logger.addHandler(kept)
    return kept


class _ConsoleHandler(logging.Handler):
    """Writes lines to standard output; where a progress bar is on the screen, above it."""

    def emit(self, record: logging.LogRecord) -> None:
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in self.format(record))
        # A reader that is gone is no reason to end the training: train.log goes on.
        with contextlib.suppress(BrokenPipeError, AttributeError):
            encoding = sys.stdout.encoding
            tqdm.write(text.encode(encoding, "replace").decode(encoding), file=sys.stdout)
            sys.stdout.flush()


class _FileFormatter(logging.Formatter):
    """Lines with the time, and moreh's with their level, as on the console."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Called by `format` once message and time are known."""
        text = super().formatMessage(record)
        if record.name == moreh_logger.name:
            text = text.replace(record.message, f"[{record.levelname.lower()}] {record.message}", 1)
        return text
