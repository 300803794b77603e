"""Checkpoints of a run: written beside the training, complete or absent, the last ones kept, and resumed from."""

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
from utils.training.workers import any_worker, rank

# Directories of checkpoints inside of that of the run.
_NAME = re.compile(r"step-(\d+)")


class Checkpoints:
    """The checkpoints in `<directory of the run>/checkpoints/`, named by the number of steps that are done.

    `to_resume` is the one that the settings say to go on from, or None.

    Raises:
        UserError: there is none where the settings say.
    """

    def __init__(self, config: Config, run_directory: Path) -> None:
        self.directory = run_directory / "checkpoints"
        self.to_resume = checkpoint_to_resume(config.checkpoint.resume, run_directory)
        self._keep = config.checkpoint.keep_last
        self._every = config.checkpoint.every_steps
        self._saving: Future[None] | None = None
        self._stop = threading.Event()
        # Only the main thread may; elsewhere no signals arrive.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._ask_to_stop)

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()

    def resume(self, model: Any, optimizer: Any, scheduler: Any, steps: int) -> tuple[int, float]:
        """Read the checkpoint to resume, on any number of workers; the steps that are done, and the first held-out loss.

        Raises:
            CheckpointError: it is of another model or optimizer.
            UserError: all `steps` of the run are done.
        """
        assert self.to_resume is not None
        extra = load_training(model, [optimizer], self.to_resume)
        scheduler.load_state_dict(extra["scheduler"])
        restore_random_states(extra["random"])
        if extra["step"] >= steps:
            raise UserError(
                f"--resume: {self.to_resume} has done {extra['step']} steps, and the run has {steps}: "
                "give a larger train.steps, or an earlier checkpoint"
            )
        return int(extra["step"]), float(extra["first_eval_loss"])

    def maybe_save(self, step: int, model: Any, optimizer: Any, scheduler: Any, first_eval_loss: float) -> None:
        """Begin to write the state after a step if the settings want it; the training goes on meanwhile.

        Raises:
            Stopped: SIGTERM has come to any worker, and the state is on the disk.
        """
        stop = any_worker(self._stop.is_set())
        if not stop and (self._every is None or step % self._every):
            return
        self.wait()
        path = self.directory / f"step-{step}"
        extra = {
            "step": step,
            "scheduler": scheduler.state_dict(),
            "first_eval_loss": first_eval_loss,
            "random": random_states(),
        }
        self.directory.mkdir(parents=True, exist_ok=True)
        self._saving = save_training(model, [optimizer], path, extra)
        if stop:
            self.wait()
            raise Stopped(f"stopped by SIGTERM after step {step}: {path} is saved; --resume auto goes on from it")

    def wait(self) -> None:
        """Wait until what was begun is on the disk; checkpoints that are too many by then are removed.

        Raises:
            OSError: it could not be written.
        """
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        saving.result()
        if rank() == 0:
            for old in checkpoints_of(self.directory)[: -self._keep]:
                shutil.rmtree(old, ignore_errors=True)


def random_states() -> dict[str, Any]:
    """The states of the generators that a script draws from, the same on all workers."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), float(gauss)),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Go on drawing where `random_states` was asked."""
    torch.set_rng_state(states["torch"])
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))


def checkpoints_of(directory: Path) -> list[Path]:
    """The complete checkpoints in a directory, the earliest first."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def checkpoint_to_resume(asked: str | None, run_directory: Path) -> Path | None:
    """What `--resume` means: nothing, "auto" (the last checkpoint of the run, if there is one), or a directory.

    Raises:
        UserError: there is no such checkpoint.
    """
    if asked is None:
        return None
    if asked == "auto":
        found = checkpoints_of(run_directory / "checkpoints")
        return found[-1] if found else None
    given = Path(asked)
    found = checkpoints_of(given / "checkpoints") or checkpoints_of(given)
    if found:
        return found[-1]
    if _NAME.fullmatch(given.name) and given.is_dir():
        return given
    raise UserError(
        f"--resume {asked}: there is no checkpoint; give auto, the directory of a run, or one of its checkpoints/step-<number>"
    )
