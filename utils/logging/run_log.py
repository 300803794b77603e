"""The files of a run: train.log, metrics.jsonl, config.yaml, run.json, report.html, loss.png."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from tqdm import tqdm
from typing_extensions import Self

from moreh.atomic_io import remove_temporaries, replacing_file
from utils.config.schema import Config
from utils.config.yaml_file import save_config
from utils.errors import DryRunEnd, Stopped, UserError, first_line, in_one_line, require_package, system_word
from utils.logging.console import set_up_loggers, train_logger
from utils.logging.metrics_file import MetricsFile
from utils.logging.trackers import Trackers, tracker_names
from utils.report.curves import ROUGE_NAMES
from utils.report.run_state import FAILED, FILE, FINISHED, STOPPED, Sample
from utils.workers import rank

if TYPE_CHECKING:
    from utils.report.live import LiveReport

METRIC_KEYS = (
    "step",
    "loss",
    "eval_loss",
    "examples_passed",
    "lr",
    "grad_norm",
    "real_tokens_per_s",
    "label_tokens_per_s",
    "padded_tokens_per_s",
    "step_s",
    "memory_in_use_bytes",
    "memory_bytes",
)
# Files that are written under another name first.
_REPLACED_FILES = ("metrics.jsonl", FILE, "report.html")


class RunLog:
    """The files of one run in its directory `<run.directory>/<run.name>/`. An earlier run of that name is kept as `.1`.

    Nothing is written before `start`, so an error before it does not rename an earlier run. An error at the first
    batch, such as a plan that does not fit, comes after `start`; `--plan-only` finds it earlier. With several workers
    only rank 0 writes: on the other ranks all methods do nothing.
    """

    def __init__(self, config: Config, *, is_dry: bool = False) -> None:
        self.directory = Path(config.run.directory) / config.run.name
        """The directory of the run."""
        self.is_dry = is_dry
        """True if the run writes nothing, and ends after a few steps."""
        self.evaluation_s = 0.0
        """Seconds of the last evaluation, its sample included."""
        self.evaluated: dict[str, float] = {}
        """Metrics of an evaluation that belong to the next step that is logged."""
        self._config = config
        self._metrics: MetricsFile | None = None
        self._bar: tqdm[Any] | None = None
        self._report: LiveReport | None = None
        self._trackers = Trackers(tracker_names(config), train_logger.warning)
        self._log_file = set_up_loggers()
        self._lock = FileLock(self.directory.with_name(f".{config.run.name}.lock"), timeout=0)
        if not sys.stderr.isatty():
            disable_progress_bars()
        if config.log.rouge_rows > 0:
            require_package("rouge_score", "log.rouge_rows", "rouge-score")

    @property
    def is_writer(self) -> bool:
        """True if this process is the one that writes the files of the run."""
        return rank() == 0

    def start(self, *, again: bool = False) -> None:
        """Make the directory of the run, and write there from now on. Call it when everything is ready to train.

        Args:
            again: True if the run resumes before its first checkpoint. Its files are then replaced.

        Raises:
            UserError: the directory cannot be made, or another run of the same name is writing to it.
        """
        if not self.is_writer or self.is_dry:
            return
        if again and self.directory.is_dir() and not _has_results(self.directory):
            self._open(lambda: _replace(self.directory / "metrics.jsonl", ""), step=0)
        else:
            self._open(lambda: _make_directory(self.directory), step=0)

    def resume(self, step: int, begin_branch: Callable[[], None] = lambda: None) -> None:
        """Continue the files of the run after a step, or start them if there are none.

        `begin_branch` is called before any file changes, while no other run can write to the directory. If the process
        is killed after it, the metrics of later steps remain; the next resumed run removes them.

        Raises:
            UserError: for the reasons of `start`, or because metrics.jsonl is damaged.
        """
        if not self.is_writer or self.is_dry or not self.directory.exists():
            self.start()
            return
        # The steps after the checkpoint are repeated.
        metrics = self.directory / "metrics.jsonl"
        try:
            lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"{metrics} has a line that no step has written: delete the file, or choose another run.name"
            ) from None

        def prepare() -> None:
            begin_branch()
            _replace(metrics, "".join(kept))

        self._open(prepare, step=step)

    def _open(self, prepare: Callable[[], object], *, step: int) -> None:
        try:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            for name in _REPLACED_FILES:
                remove_temporaries(self.directory / name)
            prepare()
            save_config(self._config, self.directory / "config.yaml")
            self._metrics = MetricsFile(self.directory / "metrics.jsonl", train_logger.warning)
            self._log_file.open(self.directory / "train.log")
        except Timeout:
            raise UserError(f"run.name: another run is writing {self.directory}: choose another run.name") from None
        except OSError as error:
            raise UserError(f"run.directory: {self.directory} cannot be made: {error.strerror}") from error
        from utils.report.live import LiveReport

        self._report = LiveReport(
            self.directory,
            step,
            self._config.train.gradient_accumulation,
            has_page=self._config.log.report,
            warn=train_logger.warning,
        )
        runs = self._trackers.start(self.directory, self._config, self._report.state.tracker_runs)
        self._report.change(tracker_runs=runs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if isinstance(error, Stopped):
            self._log_file.handle(logging.LogRecord("train", logging.INFO, "", 0, str(error), (), None))
        elif error is not None and not isinstance(error, DryRunEnd):
            text = f"the run ended with {kind.__name__ if kind else 'an error'}"
            self._log_file.handle(
                logging.LogRecord("train", logging.ERROR, "", 0, text, (), (type(error), error, trace))
            )
        if self._report is not None:
            self._report.end(*_how_it_ended(error))
        self._trackers.end()
        self._log_file.end()
        if self._metrics is not None:
            self._metrics.close()
        self._lock.release()

    def info(self, text: str) -> None:
        """Write a line, or several, to the console and train.log."""
        if self.is_writer:
            train_logger.info(text)

    def show_progress(self, total_steps: int) -> None:
        """Show a progress bar if standard error is a terminal."""
        if self.is_writer and not self.is_dry:
            self._bar = tqdm(total=total_steps, desc="training", unit=" steps", disable=None)
            if self._report is not None:
                self._report.change(total_steps=total_steps)

    def log_step(self, metrics: dict[str, float]) -> None:
        """Write the metrics of a step, some of `METRIC_KEYS`, and move the progress bar."""
        metrics, self.evaluated = {**metrics, **self.evaluated}, {}
        unknown = metrics.keys() - {*METRIC_KEYS, *ROUGE_NAMES}
        assert not unknown, unknown
        if not self.is_writer or self.is_dry:
            return
        assert self._metrics is not None, "start() comes first"
        self._metrics.add(metrics)
        self._trackers.log(metrics)
        if self._report is not None:
            self._report.add(metrics)
        if self._bar is not None:
            self._bar.update(int(metrics["step"]) - self._bar.n)
            if self._bar.n == self._bar.total:
                self._bar.close()  # otherwise the lines that follow would be written above it
                self._bar = None

    def log_sample(self, step: int, text: str) -> None:
        """Write the model's sample of the evaluation after a step to the console, train.log and the report."""
        if self.is_writer:
            train_logger.info(f"Sample:\n{text}", extra={"is_sample": True})
        if self._report is not None:
            self._report.add_sample(Sample(step, text))

    def finish(self, first_eval_loss: float, last_eval_loss: float) -> None:
        """Report the held-out loss before and after the training, draw the loss curves, and name the results."""
        if not self.is_writer:
            return
        from utils.logging.plot import draw_losses

        decrease = 1 - last_eval_loss / first_eval_loss
        self.info(f"Held-out loss: {first_eval_loss:.4f} before, {last_eval_loss:.4f} after ({decrease:.1%} less)")
        self._report_measured()
        try:
            picture = draw_losses(self.directory / "metrics.jsonl", self.directory / "loss.png")
            self.info(f"Loss curves: {picture}")
        except Exception as error:  # the model is saved; a picture is no reason to end with an error
            self.info(f"warning: the loss curves could not be drawn: {system_word(error) or in_one_line(str(error))}")
        if self._config.log.report:
            self.info(f"Report: {self.directory / 'report.html'}")
        self.info(f"Model: {self.directory / 'model'}")

    def _report_measured(self) -> None:
        """Log predicted beside measured figures, and write them to a file for `moreh-plan --calibrate`."""
        from utils.report.measured import measured_run, summary_text, write_measured

        assert self._report is not None, "start() comes first"
        measured = measured_run(self._report.state, self._report.curves, self._config.train.batch_size)
        if measured is None:
            return
        self.info(summary_text(measured))
        try:
            write_measured(self.directory, measured)
        except OSError as error:
            train_logger.warning(f"{self.directory / 'measured.jsonl'} was not written: {error.strerror}")


def _how_it_ended(error: BaseException | None) -> tuple[str, str]:
    """The status of a run in its report, and the reason of its end."""
    if error is None:
        return FINISHED, ""
    if isinstance(error, Stopped):
        return STOPPED, str(error)
    return FAILED, f"{type(error).__name__}: {first_line(error)}"


def _replace(path: Path, text: str) -> None:
    with replacing_file(path, durable=False) as file:
        file.write(text)


def _has_results(directory: Path) -> bool:
    """True if a run has left more than its logs: a model or a checkpoint."""
    return (directory / "model").exists() or any((directory / "checkpoints").glob("step-*"))


def _make_directory(directory: Path) -> None:
    """Make an empty directory; an existing one is renamed to the first free name of `<name>.1`, `<name>.2`, ..."""
    if directory.exists():
        number = 1
        while (older := directory.with_name(f"{directory.name}.{number}")).exists():
            number += 1
        directory.rename(older)
    directory.mkdir()


def disable_progress_bars() -> None:
    """Disable the progress bars of libraries, which write to files as well as to terminals."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
