"""Checkpoints of a run: written while training goes on, complete or absent, the last ones kept, and resumed from."""

import random
import re
import shutil
import signal
import threading
from concurrent.futures import Future
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from moreh.runtime.engine.checkpoint_api import load_training, save_training
from utils.config.schema import Config
from utils.errors import Stopped, UserError
from utils.logging.run_log import RunLog
from utils.training.evaluation import Evaluation
from utils.workers import any_rank, rank

# Names of checkpoints: step-<number of steps done>.
_NAME = re.compile(r"step-(\d+)")


class Checkpoints:
    """The checkpoints of a run, in `<directory of the run>/checkpoints/`.

    Raises:
        UserError: there is no checkpoint where the settings say.
    """

    def __init__(self, config: Config, log: RunLog, evaluation: Evaluation) -> None:
        self._directory = log.directory / "checkpoints"
        self._to_resume = checkpoint_to_resume(config.checkpoint.resume, log.directory)
        self._every = config.checkpoint.every_steps
        self._keep_last = config.checkpoint.keep_last
        self._log, self._evaluation = log, evaluation
        self._saving: Future[None] | None = None
        self._stop = threading.Event()
        # Only the main thread may set a signal handler.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._ask_to_stop)

    def _ask_to_stop(self, signal_number: int, frame: FrameType | None) -> None:
        self._stop.set()

    def start_or_resume(self, model: Any, optimizer: Any, scheduler: Any, total_steps: int) -> int:
        """Evaluate the model and start the run, or read the checkpoint to resume; returns the number of steps done.

        The checkpoint may be from another number of workers.

        Raises:
            CheckpointError: the checkpoint is of another model or optimizer.
            UserError: all steps of the run are done.
        """
        step = 0
        if self._to_resume is None:
            self._log.start()
            self._log.log_step({"step": 0, "eval_loss": self._evaluation(0)})
        else:
            step = self._load(self._to_resume, model, optimizer, scheduler, total_steps)
            self._log.resume(step)
            self._log.info(f"[Step {step}/{total_steps}] | Resumed from {self._to_resume}")
        self._log.show_progress(total_steps)
        return step

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
            Stopped: a worker has got SIGTERM, and the state is saved.
        """
        stop = any_rank(self._stop.is_set())
        if not stop and (self._every is None or step % self._every):
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
        if stop:
            self.flush()
            raise Stopped(f"stopped by SIGTERM after step {step}: {path} is saved; --resume auto goes on from it")

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
            for older in checkpoints_in(self._directory)[: -self._keep_last]:
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
