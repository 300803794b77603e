"""Checkpoints of a run: written while training goes on, complete or absent, the last ones kept, and resumed from."""

import random
import re
import shutil
import signal
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moreh.runtime.engine.checkpoint_api import load_training, save_training
from utils.config.schema import Config
from utils.errors import Stopped, UserError
from utils.logging.run_log import RunLog
from utils.training.disk_space import require_disk_space
from utils.training.evaluation import Evaluation
from utils.training.stopping import StopRequest, resume_command
from utils.workers import max_over_ranks, rank

# Names of checkpoints: step-<number of steps done>.
_NAME = re.compile(r"step-(\d+)")
# What a rank asks for after a step: nothing, a checkpoint because of the time, or, with the signal's number added, the
# end of the run.
_NOTHING, _SAVE, _STOP = 0, 1, 2


class Checkpoints:
    """The checkpoints of a run, in `<directory of the run>/checkpoints/`.

    Raises:
        UserError: there is no checkpoint where the settings say.
    """

    def __init__(self, config: Config, log: RunLog, evaluation: Evaluation) -> None:
        self._directory = log.directory / "checkpoints"
        self._to_resume = checkpoint_to_resume(config.checkpoint.resume, log.directory)
        self._settings = config.checkpoint
        self._log, self._evaluation = log, evaluation
        self._saving: Future[None] | None = None
        self._last_save = time.monotonic()
        self._total_steps = 0
        self._stop = StopRequest()

    def start_or_resume(self, model: Any, optimizer: Any, scheduler: Any, total_steps: int) -> int:
        """Evaluate the model and start the run, or read the checkpoint to resume; returns the number of steps done.

        The checkpoint may be from another number of workers.

        Raises:
            CheckpointError: the checkpoint is of another model or optimizer.
            UserError: all steps of the run are done, or the disk has no room for its files.
            Stopped: a signal came during the first evaluation.
        """
        step, self._total_steps = 0, total_steps
        require_disk_space(self._directory, model, self._settings)
        if self._to_resume is None:
            self._log.start()
            self._log.log_step({"step": 0, "eval_loss": self._evaluation(0)})
        else:
            step = self._load(self._to_resume, model, optimizer, scheduler, total_steps)
            self._log.resume(step)
            self._log.info(f"[Step {step}/{total_steps}] | Resumed from {self._to_resume}")
        request = self._request()
        if request >= _STOP:
            name = signal.Signals(request - _STOP).name
            raise Stopped(f"stopped by {name} before step {step + 1}: nothing new to save", request - _STOP)
        self._log.show_progress(total_steps)
        self._last_save = time.monotonic()
        return step

    def _request(self) -> int:
        """What any rank asks for; the end of the run comes before a checkpoint."""
        if self._stop.signal is not None:
            return max_over_ranks(_STOP + self._stop.signal)
        minutes = (time.monotonic() - self._last_save) / 60
        is_due = self._settings.every_minutes is not None and minutes >= self._settings.every_minutes
        return max_over_ranks(_SAVE if is_due else _NOTHING)

    def _load(self, checkpoint: Path, model: Any, optimizer: Any, scheduler: Any, total_steps: int) -> int:
        extra = load_training(model, [optimizer], checkpoint)
        scheduler.load_state_dict(extra["scheduler"])
        restore_random_states(extra["random"])
        if extra["step"] >= total_steps:
            raise UserError(
                f"--resume (checkpoint.resume): {checkpoint} has done {extra['step']} steps, and the run has "
                f"{total_steps}: give a larger train.steps, or an earlier checkpoint"
            )
        self._evaluation.first_loss = float(extra["first_eval_loss"])
        return int(extra["step"])

    def maybe_save(self, step: int, model: Any, optimizer: Any, scheduler: Any) -> None:
        """Start to write the state after a step if the settings ask for it. Training goes on meanwhile.

        Raises:
            Stopped: a signal has asked a worker to stop, and the state is saved.
        """
        if self._log.is_dry:
            return
        request = self._request()
        stops = request >= _STOP and step < self._total_steps  # after the last step, the model is about to be saved
        every = self._settings.every_steps
        if not (stops or request == _SAVE or (every is not None and step % every == 0)):
            return
        self.flush()
        path = self._directory / f"step-{step}"
        extra = {
            "step": step,
            "scheduler": scheduler.state_dict(),
            "first_eval_loss": self._evaluation.first_loss,
            "random": random_states(),
        }
        self._directory.mkdir(parents=True, exist_ok=True)
        self._saving = save_training(model, [optimizer], path, extra)
        self._last_save = time.monotonic()
        if stops:
            self.flush()
            name = signal.Signals(request - _STOP).name
            raise Stopped(
                f"stopped by {name} after step {step}, and saved in {path}; to go on: {resume_command()}",
                request - _STOP,
            )

    def flush(self) -> None:
        """Wait until the checkpoint that is being written is complete. Then remove all but the last ones.

        Raises:
            OSError: the checkpoint could not be written.
        """
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        saving.result()
        if rank() == 0:
            for older in checkpoints_in(self._directory)[: -self._settings.keep_last]:
                shutil.rmtree(older, ignore_errors=True)


def random_states() -> dict[str, Any]:
    """The states of the random generators that a script draws from, which are the same on all workers."""
    _, keys, position, has_gauss, cached_gaussian = np.random.get_state()
    numpy_state = (torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss))
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (*numpy_state, float(cached_gaussian)),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Set the random generators to what `random_states` returned."""
    torch.set_rng_state(states["torch"])
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    keys, position, has_gauss, cached_gaussian = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached_gaussian))


def checkpoints_in(directory: Path) -> list[Path]:
    """The complete checkpoints in a directory, the earliest first."""
    if not directory.is_dir():
        return []
    by_step = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(by_step)]


def checkpoint_to_resume(resume: str | None, run_directory: Path) -> Path | None:
    """The checkpoint that `--resume` means: none, "auto" (the last one of the run, if any), or a directory.

    Raises:
        UserError: there is no such checkpoint.
    """
    if resume is None:
        return None
    if resume == "auto":
        checkpoints = checkpoints_in(run_directory / "checkpoints")
        return checkpoints[-1] if checkpoints else None
    directory = Path(resume)
    checkpoints = checkpoints_in(directory / "checkpoints") or checkpoints_in(directory)
    if checkpoints:
        return checkpoints[-1]
    if _NAME.fullmatch(directory.name) and directory.is_dir():
        return directory
    raise UserError(
        f"--resume {resume} (checkpoint.resume): there is no checkpoint; give auto, the directory of a run, or one "
        "of its checkpoints/step-<number>"
    )
