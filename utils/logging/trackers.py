"""Sends the metrics of a run to trackers: TensorBoard, Weights & Biases, MLflow.

A tracker that cannot start is an error before the first step. One that fails later is left out from then on, with a
line in the log, and the training goes on.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from utils.config.schema import Config
from utils.errors import UserError, first_line, require_package


class Tracker(Protocol):
    """A run in a tracker."""

    @property
    def run_id(self) -> str:
        """The run's name at the tracker, so that a resumed run continues it; empty if the tracker needs no name."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send the metrics of a step."""

    def end(self) -> None:
        """Send the remaining metrics."""


class Trackers:
    """The trackers of a run.

    Args:
        names: of the trackers.
        warn: takes the line about one that fails.

    Raises:
        UserError: a package is not installed.
    """

    def __init__(self, names: Sequence[str], warn: Callable[[str], None]) -> None:
        self._names, self._warn = names, warn
        self._running: dict[str, Tracker] = {}
        for name in names:
            require_package(name, f"log.trackers: {name}")

    def start(self, directory: Path, config: Config, earlier_runs: Mapping[str, str]) -> dict[str, str]:
        """Start a run in each tracker, or continue an earlier one; returns the run's ids.

        Raises:
            UserError: a tracker refuses.
        """
        for name in self._names:
            try:
                self._running[name] = _CLASSES[name](directory, config, earlier_runs.get(name))
            except Exception as error:  # each library has errors of its own
                raise UserError(
                    f"log.trackers: {name} cannot start: {first_line(error)}: fix this, or remove {name}"
                ) from error
        return {**earlier_runs, **{name: run.run_id for name, run in self._running.items() if run.run_id}}

    def log(self, metrics: Mapping[str, float]) -> None:
        """Send the metrics of a step, which has `step` among them."""
        values = {key: value for key, value in metrics.items() if key != "step"}
        for name in list(self._running):
            self._guarded(name, lambda run: run.log(values, int(metrics["step"])))

    def end(self) -> None:
        """Send the remaining metrics, and end the runs."""
        for name in list(self._running):
            self._guarded(name, lambda run: run.end())
        self._running.clear()

    def _guarded(self, name: str, action: Callable[[Tracker], None]) -> None:
        try:
            action(self._running[name])
        except Exception as error:  # a server that is down is no reason to lose a training
            del self._running[name]
            self._warn(f"log.trackers: {name} gets no more metrics, since it failed: {first_line(error)}")


def tracker_names(config: Config) -> list[str]:
    """The trackers that the settings ask for, each once."""
    asked = ["tensorboard"] if config.run.tensorboard else []
    return list(dict.fromkeys([*asked, *config.log.trackers]))


class _TensorBoard:
    """Event files in the directory of the run."""

    run_id = ""

    def __init__(self, directory: Path, config: Config, run_id: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def end(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run of wandb, which WANDB_MODE, WANDB_PROJECT and the other variables of the library decide about."""

    def __init__(self, directory: Path, config: Config, run_id: str | None) -> None:
        import wandb

        self._run = wandb.init(
            name=config.run.name,
            dir=str(directory),
            config=config.model_dump(),
            id=run_id,
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        self.run_id = str(self._run.id)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def end(self) -> None:
        self._run.finish()


class _MLflow:
    """A run of MLflow, in the experiment and at the server that the library's variables name.

    Metrics are sent together, since a call may wait for a server.
    """

    def __init__(self, directory: Path, config: Config, run_id: str | None) -> None:
        import mlflow

        self._run = mlflow.start_run(run_id=run_id, run_name=None if run_id else config.run.name)
        self.run_id = str(self._run.info.run_id)
        self._kept: list[Any] = []
        self._last_sent = time.monotonic()
        if run_id is None:  # the settings of a resumed run may have changed, and MLflow refuses to change them
            mlflow.log_params({key: str(value)[:_MLFLOW_TEXT] for key, value in _flat(config.model_dump()).items()})

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._kept += [Metric(key, value, now_ms, step) for key, value in metrics.items()]
        if len(self._kept) > _MLFLOW_METRICS - len(metrics) or time.monotonic() - self._last_sent > _MLFLOW_SECONDS:
            self._send()

    def end(self) -> None:
        import mlflow

        self._send()
        mlflow.end_run()

    def _send(self) -> None:
        from mlflow import MlflowClient

        kept, self._kept, self._last_sent = self._kept, [], time.monotonic()
        if kept:
            MlflowClient().log_batch(self.run_id, metrics=kept)


# The most metrics that a call takes, and the seconds between two calls.
_MLFLOW_METRICS, _MLFLOW_SECONDS = 1000, 10.0
# The longest value of a parameter that every MLflow server takes.
_MLFLOW_TEXT = 500
_CLASSES: dict[str, Callable[[Path, Config, str | None], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "mlflow": _MLflow,
}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their names, such as train.lr."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
