"""What a run leaves behind while it goes on: the console and train.log, metrics.jsonl, TensorBoard, the loss curves."""

import importlib.util
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import datasets
import transformers
from filelock import FileLock, Timeout
from tqdm import tqdm
from typing_extensions import Self

from utils.config.schema import Config
from utils.config.yaml_file import save_config
from utils.errors import UserError
from utils.logging.console import keep_lines, train_logger
from utils.training.workers import rank

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


class RunLog:
    """The files of one run in its directory `<run.directory>/<run.name>/`; an earlier run of that name is kept as `.1`.

    Nothing is written before `begin`, so a start that fails leaves an earlier run where it is, unless it fails at the first
    batch, as for want of a plan (`--plan-only` tells before). Of several workers only the first one writes: in the others
    `is_writer` is false, and all methods do nothing.
    """

    def __init__(self, config: Config) -> None:
        self.directory = Path(config.run.directory) / config.run.name
        self.is_writer = rank() == 0
        self._config = config
        self._metrics: TextIO | None = None
        self._bar: tqdm[Any] | None = None
        self._tensorboard: Any = None
        self._lines = keep_lines()
        self._lock = FileLock(self.directory.with_name(f".{config.run.name}.lock"), timeout=0)
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
        if self.is_writer:
            self._open(lambda: _make_directory(self.directory))

    def _open(self, prepare: Callable[[], object]) -> None:
        try:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            prepare()
            save_config(self._config, self.directory / "config.yaml")
            self._metrics = (self.directory / "metrics.jsonl").open("a", encoding="utf-8")
            self._lines.write_to(self.directory / "train.log")
        except Timeout:
            raise UserError(f"run.name: another run is writing {self.directory}: choose another run.name") from None
        except OSError as error:
            raise UserError(f"run.directory: {self.directory} cannot be made: {error.strerror}") from error
        if self._config.run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.directory / "tensorboard"))

    def resume(self, done: int) -> None:
        """Write on in the directory of the run after so many steps, or make one if there is none.

        Raises:
            UserError: as `begin`.
        """
        if not self.is_writer or not self.directory.exists():
            self.begin()
            return
        # What came after the checkpoint is done again.
        metrics = self.directory / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
        try:
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{metrics} has a line that no step has written: delete it, or give the run another name"
            ) from None
        self._open(lambda: metrics.write_text("".join(kept), encoding="utf-8"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if error is not None:
            text = f"the run ended with {kind.__name__ if kind else 'an error'}"
            self._lines.handle(logging.LogRecord("train", logging.ERROR, "", 0, text, (), (kind, error, trace)))  # type: ignore[arg-type]
        self._lines.end()
        if self._metrics is not None:
            self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._lock.release()

    def say(self, text: str) -> None:
        """A line, or several, on the console and in train.log."""
        if self.is_writer:
            train_logger.info(text)

    def show_progress(self, total_steps: int) -> None:
        """Show a progress bar if standard error is a terminal."""
        if self.is_writer:
            self._bar = tqdm(total=total_steps, desc="training", unit=" steps", disable=None)

    def log_step(self, metrics: dict[str, float]) -> None:
        """Write the figures of a step, any of `METRIC_KEYS`, and move the progress bar."""
        unknown = metrics.keys() - set(METRIC_KEYS)
        assert not unknown, unknown
        if not self.is_writer:
            return
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
        """Draw loss.png from metrics.jsonl; returns its path."""
        from utils.logging.plot import draw_losses

        picture = self.directory / "loss.png"
        return draw_losses(self.directory / "metrics.jsonl", picture) if self.is_writer else picture


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
