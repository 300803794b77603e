"""Updates the report during a run."""

import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from utils.report.curves import RunCurves, read_curves
from utils.report.environment import environment_rows
from utils.report.page import Report, page_html
from utils.report.run_state import (
    KILLED,
    RUNNING,
    RunState,
    Sample,
    is_being_written,
    read_state,
    write_state,
    write_text,
)

PAGE = "report.html"
# Minimum number of seconds between two updates of the page, which happen after a step.
SECONDS_BETWEEN_RENEWALS = 15.0


class LiveReport:
    """Keeps run.json and, if the settings ask for it, report.html of a run.

    No error of it ends a training: the first one is reported, and the next renewal tries again.

    Args:
        directory: of the run; it has config.yaml.
        step: the steps that are done. Later ones in the files of an earlier process are about to be repeated.
        batches_per_step: forward passes of a step.
        has_page: whether to write report.html.
        warn: takes the line about the first error.
    """

    def __init__(
        self, directory: Path, step: int, batches_per_step: int, *, has_page: bool, warn: Callable[[str], None]
    ) -> None:
        self._directory, self._has_page, self._warn = directory, has_page, warn
        self._has_warned = False
        self._next_renewal = 0.0
        self._written: RunState | None = None
        self._curves = read_curves(directory / "metrics.jsonl")
        self._settings = _read_settings(directory)
        earlier = read_state(directory)
        self.state = RunState(
            time.time(), command=shlex.join(["python", *sys.argv]), first_step=step, batches_per_step=batches_per_step
        )
        """Metadata of the run."""
        if earlier is not None:
            samples = [sample for sample in earlier.samples if sample.step <= step]
            self.state = replace(
                self.state, samples=samples, tracker_runs=earlier.tracker_runs, total_steps=earlier.total_steps
            )
        self._guarded(self._take_environment)
        self.renew()

    @property
    def curves(self) -> RunCurves:
        """The metrics of the run until now."""
        return self._curves

    def add(self, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step. The page is renewed if it is due, or if the model was evaluated."""
        self._curves.add(metrics)
        if "eval_loss" in metrics or time.monotonic() >= self._next_renewal:
            self.renew()

    def add_sample(self, sample: Sample) -> None:
        """Take a sample, which the next renewal shows."""
        self.state = self.state.with_sample(sample)

    def change(self, **changes: Any) -> None:
        """Change fields of the state, and renew the page."""
        self.state = replace(self.state, **changes)
        self.renew()

    def end(self, status: str, detail: str) -> None:
        """Renew the page for the last time."""
        self.change(status=status, detail=detail, ended=time.time())

    def renew(self) -> None:
        """Write run.json if it has changed, and the page."""
        self._guarded(self._write)
        self._next_renewal = time.monotonic() + SECONDS_BETWEEN_RENEWALS

    def _take_environment(self) -> None:
        import torch

        is_simulated = not torch.accelerator.is_available()
        self.state = replace(self.state, environment=environment_rows(), is_simulated=is_simulated)

    def _write(self) -> None:
        from moreh.accelerator.job import local_job_if_started

        job = local_job_if_started()
        if job is not None and job.chosen_plans:
            self.state = replace(self.state, plans=[asdict(plan) for plan in job.chosen_plans.values()])
        if self.state != self._written:
            write_state(self._directory, self.state)
            self._written = self.state
        if self._has_page:
            report = Report(self._directory.name, self.state, self._curves, self._settings, time.time())
            write_text(self._directory / PAGE, page_html(report))

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # also a mistake in the page is no reason to lose hours of training
            if not self._has_warned:
                self._has_warned = True
                self._warn(f"{self._directory / PAGE} was not written, and is tried again: {error or type(error)}")


def write_report(directory: Path) -> Path:
    """Write report.html of a run from the files in its directory; returns its path.

    Raises:
        OSError: the page cannot be written.
    """
    state = read_state(directory)
    if state is None:
        state = RunState(started=(directory / "config.yaml").stat().st_mtime, status="unknown", detail="no run.json")
    elif state.status == RUNNING and not is_being_written(directory):
        state = replace(state, status=KILLED, detail="the run ended without a word, as after SIGKILL or a power cut")
    metrics = directory / "metrics.jsonl"
    if state.ended is None and state.status != RUNNING and metrics.exists():
        state = replace(state, ended=max(state.started, metrics.stat().st_mtime))
    report = Report(directory.name, state, read_curves(metrics), _read_settings(directory), time.time())
    write_text(directory / PAGE, page_html(report))
    return directory / PAGE


def _read_settings(directory: Path) -> str:
    path = directory / "config.yaml"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
