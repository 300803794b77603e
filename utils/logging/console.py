"""The log lines of a run, from the scripts and from moreh: on the console and in train.log."""

import contextlib
import logging
import logging.handlers
import sys
from pathlib import Path

from tqdm import tqdm

from moreh.console.output import say
from moreh.console.printable import printable
from moreh.log import LevelInBrackets, set_up_logger
from moreh.log import logger as moreh_logger
from moreh.tables import terminal_width, wrap_line

train_logger = logging.getLogger("train")


class LogFileHandler(logging.handlers.MemoryHandler):
    """Keeps log lines in memory until the file of the run exists, and writes them there from then on."""

    def __init__(self) -> None:
        super().__init__(capacity=sys.maxsize, flushLevel=logging.CRITICAL + 1, flushOnClose=False)

    def open(self, path: Path) -> None:
        """Write the lines that were kept, and all that follow, to this file.

        Raises:
            OSError: the file cannot be made.
        """
        file = _LogFile(path, encoding="utf-8", errors="replace")
        file.setFormatter(_FileFormatter())
        self.setTarget(file)
        self.flushLevel = logging.NOTSET  # the next line is written with those that were kept

    def end(self) -> None:
        """Take no more lines, and close the file."""
        for logger in (train_logger, moreh_logger):
            logger.removeHandler(self)
        if self.target is not None:
            self.flush()
            with contextlib.suppress(OSError):  # a full disk, which a line has reported
                self.target.close()
        self.close()


def set_up_loggers() -> LogFileHandler:
    """Show the lines of the run and of moreh on the console from now on; returns the handler of their file."""
    log_file = LogFileHandler()
    _ConsoleHandler.has_warned = False
    train_logger.setLevel(logging.INFO)
    train_logger.propagate = False
    set_up_logger()
    for logger, formatter in ((train_logger, logging.Formatter("%(message)s")), (moreh_logger, LevelInBrackets())):
        console = _ConsoleHandler()
        console.setFormatter(formatter)
        logger.handlers.clear()
        logger.addHandler(console)
        logger.addHandler(log_file)
    return log_file


class _LogFile(logging.FileHandler):
    """A file of log lines. Lines that the disk does not take are no reason to end a training: one line tells of it."""

    _has_warned = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Report an error of writing a line, once: logging itself would print a traceback for each line."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_warned:
            self._has_warned = True
            say(f"warning: {self.baseFilename} cannot be written: {error.strerror}; training continues")


class _ConsoleHandler(logging.Handler):
    """Writes lines to standard output, above a progress bar that is on the screen."""

    has_warned = False
    """True once a line has said that the log cannot be written. The handlers of both loggers share it."""

    def emit(self, record: logging.LogRecord) -> None:
        text = printable(self.format(record), kept="\n\t", mark="\ufffd")
        width = terminal_width()
        if "\n" not in text or getattr(record, "is_sample", False):  # other texts with several lines are tables
            lines = (wrap_line(line, width, indent=2) if len(line) > width else line for line in text.split("\n"))
            text = "\n".join(lines)
        # A closed pipe, as after `| head`, or a full disk does not end the run: train.log continues.
        try:
            encoding = sys.stdout.encoding or "utf-8"  # a StringIO has none
            tqdm.write(text.encode(encoding, "replace").decode(encoding), file=sys.stdout)
            sys.stdout.flush()
        except (BrokenPipeError, AttributeError):
            pass
        except OSError as error:
            if not _ConsoleHandler.has_warned:
                _ConsoleHandler.has_warned = True
                say(f"warning: standard output cannot be written: {error.strerror}; training continues")


class _FileFormatter(logging.Formatter):
    """Formats lines with their time, and those of moreh with their level, as on the console."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Format a record whose message and time are known."""
        text = super().formatMessage(record)
        if record.name == moreh_logger.name:
            text = text.replace(record.message, f"[{record.levelname.lower()}] {record.message}", 1)
        return text
