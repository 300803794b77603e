"""What a run leaves behind while it goes on: the console and train.log, metrics.jsonl, TensorBoard, the loss curves."""

import json
import logging
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import datasets
import transformers
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
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class RunLog:
    """The files of one run in its directory `<run.directory>/<run.name>/`; an earlier run of that name is kept as `.1`."""

    def __init__(self, config: Config) -> None:
        self.directory = _make_directory(Path(config.run.directory) / config.run.name)
        save_config(config, self.directory / "config.yaml")
        self._metrics = (self.directory / "metrics.jsonl").open("w", encoding="utf-8")
        self._file = logging.FileHandler(self.directory / "train.log", encoding="utf-8")
        self._logger = logging.getLogger("train")
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        set_up_logger()
        plain = logging.Formatter("%(message)s")
        for logger, console, formatter in (
            (self._logger, _ConsoleHandler(), plain),
            (moreh_logger, _ConsoleHandler(), LevelInBrackets()),
        ):
            logger.handlers.clear()
            console.setFormatter(formatter)
            logger.addHandler(console)
            logger.addHandler(self._file)
        self._file.setFormatter(_FileFormatter())
        if not sys.stderr.isatty():  # their bars do not look by themselves
            datasets.disable_progress_bars()
            transformers.utils.logging.disable_progress_bar()
        self._bar: tqdm[Any] | None = None
        self._tensorboard = _open_tensorboard(self.directory) if config.run.tensorboard else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        if error is not None:
            self._file.handle(
                logging.LogRecord("train", logging.ERROR, "", 0, "the run ended with an error", (), (kind, error, trace))  # type: ignore[arg-type]
            )
        self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

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
        print(json.dumps(metrics), file=self._metrics, flush=True)
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

        self._metrics.flush()
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


def _make_directory(directory: Path) -> Path:
    """An empty directory; one that is there already moves to the first free of `<name>.1`, `<name>.2`, ..."""
    try:
        if directory.exists():
            number = 1
            while (kept := directory.with_name(f"{directory.name}.{number}")).exists():
                number += 1
            directory.rename(kept)
        directory.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"run.directory: {directory} cannot be made: {error.strerror}") from error
    return directory


def _open_tensorboard(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("run.tensorboard: the package tensorboard is not installed: pip install tensorboard") from None
    return SummaryWriter(str(directory / "tensorboard"))
