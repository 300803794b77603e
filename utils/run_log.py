"""What a run leaves behind while it goes on: the console and train.log, metrics.jsonl, TensorBoard, the loss curves."""

import contextlib
import importlib.util
import json
import logging
import logging.handlers
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import datasets
import transformers
from filelock import FileLock, Timeout
from tqdm import tqdm
from typing_extensions import Self

from moreh.log import LevelInBrackets, set_up_logger
from moreh.log import logger as moreh_logger
from utils.config import Config
from utils.config_file import save_config
from utils.errors import UserError

METRIC_KEYS = (
    "step",
    "loss",
    "eval_loss",
    "lr",
    "grad_norm",
    "real_tokens_per_s",
    "label_tokens_per_s",
    "padded_tokens_per_s",
    "memory_bytes",
)


class _ConsoleHandler(logging.Handler):
    """Writes lines to standard output; where a progress bar is on the screen, above it."""

    def emit(self, record: logging.LogRecord) -> None:
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in self.format(record))
        # A reader that is gone is no reason to end the training: train.log goes on.
        with contextlib.suppress(BrokenPipeError, AttributeError):
            encoding = sys.stdout.encoding
            tqdm.write(text.encode(encoding, "replace").decode(encoding), file=sys.stdout)
            sys.stdout.flush()


class RunLog:
    """The files of one run in its directory `<run.directory>/<run.name>/`; an earlier run of that name is kept as `.1`.

    Nothing is written before `begin`, so a start that fails leaves an earlier run where it is.
    """

    def __init__(self, config: Config) -> None:
        self.directory = Path(config.run.directory) / config.run.name
        self._config = config
        self._metrics: TextIO | None = None
        self._bar: tqdm[Any] | None = None
        self._tensorboard: Any = None
        # Keeps the lines until there is a file for them.
        self._file = logging.handlers.MemoryHandler(capacity=sys.maxsize, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self._lock = FileLock(self.directory.with_name(f".{config.run.name}.lock"), timeout=0)
        self._logger = logging.getLogger("train")
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        set_up_logger()
        for logger, formatter in ((self._logger, logging.Formatter("%(message)s")), (moreh_logger, LevelInBrackets())):
            console = _ConsoleHandler()
            console.setFormatter(formatter)
            logger.handlers.clear()
            logger.addHandler(console)
            logger.addHandler(self._file)
        if not sys.stderr.isatty():  # their bars do not look by themselves
            datasets.disable_progress_bars()
            transformers.utils.logging.disable_progress_bar()
        if config.run.tensorboard:
            _require_tensorboard()

    def begin(self) -> None:
        """Make the directory of the run and write there from now on; to be called when everything is ready to train.

        Raises:
            UserError: it cannot be made, or another run of the same name is writing it.
        """
        try:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            _make_directory(self.directory)
            save_config(self._config, self.directory / "config.yaml")
            self._metrics = (self.directory / "metrics.jsonl").open("w", encoding="utf-8")
            file = logging.FileHandler(self.directory / "train.log", encoding="utf-8", errors="replace")
        except Timeout:
            raise UserError(f"run.name: another run is writing {self.directory}: choose another run.name") from None
        except OSError as error:
            raise UserError(f"run.directory: {self.directory} cannot be made: {error.strerror}") from error
        file.setFormatter(_FileFormatter())
        self._file.setTarget(file)
        self._file.flushLevel = logging.NOTSET  # what was kept goes out with the next line
        if self._config.run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.directory / "tensorboard"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        if error is not None:
            text = f"the run ended with {kind.__name__ if kind else 'an error'}"
            self._file.handle(logging.LogRecord("train", logging.ERROR, "", 0, text, (), (kind, error, trace)))  # type: ignore[arg-type]
        for logger in (self._logger, moreh_logger):
            logger.removeHandler(self._file)
        if self._file.target is not None:
            self._file.flush()
            self._file.target.close()
        self._file.close()
        if self._metrics is not None:
            self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._lock.release()

    def say(self, text: str) -> None:
        """A line, or several, on the console and in train.log."""
        self._logger.info(text)

    def show_progress(self, total_steps: int) -> None:
        """Show a progress bar if standard error is a terminal."""
        self._bar = tqdm(total=total_steps, desc="training", unit=" steps", disable=None)

    def step_done(self, metrics: dict[str, float]) -> None:
        """Write the figures of a step, any of `METRIC_KEYS`, and move the progress bar."""
        unknown = metrics.keys() - set(METRIC_KEYS)
        assert not unknown, unknown
        assert self._metrics is not None, "begin() comes first"
        print(json.dumps(metrics, allow_nan=False), file=self._metrics, flush=True)
        if self._tensorboard is not None:
            for key in metrics.keys() - {"step"}:
                self._tensorboard.add_scalar(key, metrics[key], int(metrics["step"]))
        if self._bar is not None:
            self._bar.update(int(metrics["step"]) - self._bar.n)
            if self._bar.n == self._bar.total:
                self._bar.close()  # else the lines that follow would be written above it
                self._bar = None

    def draw_losses(self) -> Path:
        """Draw loss.png from metrics.jsonl."""
        from utils.plot import draw_losses

        return draw_losses(self.directory / "metrics.jsonl", self.directory / "loss.png")


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


def _make_directory(directory: Path) -> None:
    """An empty directory; one that is there already moves to the first free of `<name>.1`, `<name>.2`, ..."""
    if directory.exists():
        number = 1
        while (kept := directory.with_name(f"{directory.name}.{number}")).exists():
            number += 1
        directory.rename(kept)
    directory.mkdir()


def _require_tensorboard() -> None:
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("run.tensorboard: the package tensorboard is not installed: pip install tensorboard")
