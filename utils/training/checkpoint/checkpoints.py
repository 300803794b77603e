"""Saves, keeps and resumes the checkpoints of a run."""

import math
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from moreh.errors import CheckpointError, MorehError
from moreh.runtime.checkpoint.manifest import MANIFEST
from moreh.runtime.engine.checkpoint_api import check_training, load_training, save_training
from moreh.runtime.launch.world import restarted_since
from moreh.trace import span
from utils.config.schema import Config
from utils.data.dataset import RunData
from utils.errors import UserError, first_line, system_word
from utils.logging.run_log import RunLog
from utils.training.checkpoint.base_weights import frozen_names
from utils.training.checkpoint.disk_space import bytes_of_checkpoint, lack_of_space, require_disk_space
from utils.training.checkpoint.files import (
    checkpoints_in,
    checkpoints_to_resume,
    prune,
    remove_unfinished,
    set_aside,
    step_of,
)
from utils.training.checkpoint.random_states import random_states, restore_random_states
from utils.training.checkpoint.resume_settings import compare, describe_run, require_same, table_of
from utils.training.checkpoint.stopping import StopRequest, resume_command
from utils.training.checkpoint.time_limit import GracePeriod, end_of_run, time_limit
from utils.training.evaluation import Evaluation
from utils.training.lr_schedule import restore_scheduler
from utils.workers import max_over_ranks, rank

# The request of a rank after a step: nothing, a checkpoint because of the time, or the end of the run. The cause of the
# end is a time limit or, if the number of a signal is added, a signal.
_NOTHING, _SAVE, _STOP = 0, 1, 2
# Settings of the optimizer's groups that come from the settings of the run, which have been compared.
_OF_SETTINGS = ("lr", "initial_lr", "weight_decay")
# A checkpoint that could not be saved is tried again after this time, if none is due before.
_RETRY_MINUTES = 5


class Checkpoints:
    """The checkpoints of a run, in `<directory of the run>/checkpoints/`.

    Raises:
        UserError: there is no checkpoint where the settings say.
    """

    def __init__(self, config: Config, data: RunData, log: RunLog, evaluation: Evaluation) -> None:
        self._directory = log.directory / "checkpoints"
        self._to_resume = checkpoints_to_resume(config.checkpoint.resume, log.directory, restarted_since())
        self._config, self._settings, self._data = config, config.checkpoint, data
        self._log, self._evaluation = log, evaluation
        self._saving: tuple[Path, Future[None]] | None = None
        self._last_saved: Path | None = None
        self._last_save = time.monotonic()
        self._has_failed, self._checkpoint_bytes, self._total_steps = False, 0, 0
        self._described: dict[str, Any] = {}
        self._frozen: list[str] = []
        self._stop, self._grace, self._limit = StopRequest(), GracePeriod(config.stop), time_limit(config.stop)

    def start_or_resume(self, model: Any, optimizer: Any, scheduler: Any, total_steps: int) -> int:
        """Evaluate the model and start the run, or read the checkpoint to resume; returns the number of steps done.

        The checkpoint may be from another number of workers. If all steps are done, the model is evaluated.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another model or optimizer.
            UserError: the checkpoint is of another training, or has more steps than the run; the disk has no room for
                the files of the run; or the time limit leaves no time to train.
            Stopped: a signal came during the first evaluation.
        """
        step, self._total_steps = 0, total_steps
        self._described = describe_run(self._config, self._data, model)  # before the model is sharded
        self._frozen = frozen_names(model, self._config)
        require_disk_space(self._directory, model, self._config)
        self._checkpoint_bytes = bytes_of_checkpoint(model, self._config)
        self._grace.expect_save(self._checkpoint_bytes)
        if not self._to_resume:
            self._log.start(again=self._settings.resume == "auto" or restarted_since() is not None)
            if self._log.is_writer and not self._log.is_dry:
                remove_unfinished(self._directory)
            self._log.log_step({"step": 0, "eval_loss": self._evaluation(0)})
        else:
            step = self._resume(model, optimizer, scheduler)
        request = self._request()
        if request == _STOP and step < total_steps:
            raise UserError(  # not Stopped, whose exit code asks for a restart: it would be restarted for ever
                f"{'the time limit' if self._limit is None else self._limit.name} is nearer than the grace period of "
                f"{self._grace.seconds:.0f} s, so no step can be trained: raise it, or lower stop.grace_seconds"
            )
        if request > _STOP and step < total_steps:
            raise end_of_run(request - _STOP, self._limit, f"before step {step + 1}: nothing new to save")
        self._log.show_progress(total_steps)
        self._last_save = time.monotonic()
        self._grace.end_step()
        return step

    def _resume(self, model: Any, optimizer: Any, scheduler: Any) -> int:
        """Resume from the newest intact checkpoint; returns its step."""
        damaged = []
        for checkpoint in self._to_resume:
            try:
                about = _checked(checkpoint)
                break
            except CheckpointError as error:
                damaged.append(error)
        else:
            raise CheckpointError("\n".join(map(str, damaged)))
        differences = compare(about, self._described, [type(optimizer).__name__])
        require_same(differences, self._config, checkpoint)
        step, total_steps = int(about["script"]["step"]), self._total_steps
        if step > total_steps:
            raise UserError(
                f"--resume (checkpoint.resume): {checkpoint} has done {step} steps, and the run has "
                f"{total_steps}: give a larger train.steps, or an earlier checkpoint"
            )
        extra = self._load(model, optimizer, checkpoint, about)
        try:
            restore_scheduler(scheduler, optimizer, extra["scheduler"])
            restore_random_states(extra["random"])
            self._evaluation.first_loss = float(extra["first_eval_loss"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{checkpoint} has a state that no training script writes ({type(error).__name__}: "
                f"{first_line(error)[:200]}). Give an earlier checkpoint."
            ) from error
        lines = [f"Not resumed: {reason}" for reason in damaged]
        self._log.resume(step, lambda: lines.extend(self._begin_branch(checkpoint, self._to_resume[: len(damaged)])))
        for line in lines:
            self._log.info(line)
        self._log.info(f"[Step {step}/{total_steps}] | Resumed from {checkpoint}")
        if differences:
            self._log.info(f"Differences from the checkpoint:\n{table_of(differences)}")
        self._last_saved = checkpoint
        if step == total_steps:
            self._log.info(f"All {total_steps} steps are done: evaluating and saving the model")
            self._evaluation(step)
        return step

    def _begin_branch(self, checkpoint: Path, damaged: list[Path]) -> list[str]:
        """Rename the checkpoints that do not lead to the resumed one, and remove old ones; returns log lines.

        The newest one is renamed last: if the process is killed before, the next run resumes from it.
        """
        lines = []
        is_own = checkpoint.resolve().parent == self._directory.resolve()
        for other in checkpoints_in(self._directory):
            if not is_own or step_of(other) > step_of(checkpoint):
                is_damaged = other.resolve() in {path.resolve() for path in damaged}
                aside = set_aside(other, "damaged" if is_damaged else "abandoned")
                lines += [f"Renamed {other.name} of the earlier run to {aside}"]
        remove_unfinished(self._directory)
        prune(self._directory, self._settings.keep_last, keep_best=self._settings.keep_best)
        return lines

    def _request(self) -> int:
        """The request of any rank; the end of the run has priority over a checkpoint."""
        if self._stop.signal is not None:
            return max_over_ranks(_STOP + self._stop.signal)
        if self._limit is not None and time.time() + self._grace.seconds >= self._limit.ends:
            return max_over_ranks(_STOP)
        minutes = (time.monotonic() - self._last_save) / 60
        is_due = self._settings.every_minutes is not None and minutes >= self._settings.every_minutes
        is_due |= self._has_failed and minutes >= _RETRY_MINUTES
        return max_over_ranks(_SAVE if is_due else _NOTHING)

    def maybe_save(self, step: int, model: Any, optimizer: Any, scheduler: Any) -> None:
        """Start to write a checkpoint if one is due after a step. Training continues meanwhile.

        Raises:
            Stopped: a signal has asked a worker to stop, or the time limit is near, and the state is saved.
        """
        if self._log.is_dry:
            return
        self._grace.end_step()
        if self._saving is not None and self._saving[1].done():
            self.flush()
        request = self._request()
        stops = request >= _STOP and step < self._total_steps  # after the last step, the model is about to be saved
        every = self._settings.every_steps
        if not (stops or request == _SAVE or (every is not None and step % every == 0)):
            return
        self.flush()
        is_saving = self._save(step, model, optimizer, scheduler)
        if stops:
            path = self._directory / f"step-{step}"
            is_saved = self.flush() and is_saving
            saved = f"saved in {path}" if is_saved else f"not saved; the last checkpoint is {self._last_saved}"
            raise end_of_run(
                request - _STOP, self._limit, f"after step {step}, and {saved}; to continue: {resume_command()}"
            )

    def go_back(self, model: Any, optimizer: Any) -> Path:
        """Load the weights and the optimizer's state of the last checkpoint; collective. Returns the checkpoint.

        Raises:
            CheckpointError: it is damaged.
            UserError: there is none yet.
        """
        self.flush()
        if self._last_saved is None:
            raise UserError("train.non_finite: there is no checkpoint to go back to; lower checkpoint.every_steps")
        self._load(model, optimizer, self._last_saved, check_training(self._last_saved))
        return self._last_saved

    def _load(self, model: Any, optimizer: Any, checkpoint: Path, about: dict[str, Any]) -> Any:
        """Load a checkpoint whose files were checked. Frozen weights are missing in it if its manifest says so."""
        without = self._frozen if about["script"].get("without_frozen") else ()
        return load_training(model, [optimizer], checkpoint, keep=_OF_SETTINGS, without=without, is_checked=True)

    def _save(self, step: int, model: Any, optimizer: Any, scheduler: Any) -> bool:
        """Start to write a checkpoint; returns False if the disk has no room for it."""
        evaluation = self._evaluation
        path = self._directory / f"step-{step}"
        self._last_save = time.monotonic()
        lack = lack_of_space(self._directory, self._checkpoint_bytes) if rank() == 0 else None
        if max_over_ranks(int(lack is not None)):
            self._say_not_saved(path, lack or "")
            return False
        state, first_loss = scheduler.state_dict(), evaluation.first_loss
        extra = {"step": step, "scheduler": state, "first_eval_loss": first_loss, "random": random_states()}
        is_evaluated = evaluation.last_step == step and math.isfinite(evaluation.last_loss)
        about = {
            "step": step,
            "eval_loss": evaluation.last_loss if is_evaluated else None,
            "without_frozen": bool(self._frozen),
            "parent": None if self._last_saved is None else str(self._last_saved),
            **self._described,
        }
        started = time.monotonic()
        future = save_training(model, [optimizer], path, extra, about, without=self._frozen)
        future.add_done_callback(lambda saved: self._grace.end_save(time.monotonic() - started))
        self._saving = path, future
        return True

    def flush(self) -> bool:
        """Wait until the checkpoint in progress is complete, then remove old ones; returns False if it failed.

        A failure is logged, and training continues.
        """
        if self._saving is None:
            return True
        (path, saving), self._saving = self._saving, None
        try:
            with span("flush_checkpoint"):
                saving.result()
        except (OSError, MorehError) as error:
            self._say_not_saved(path, system_word(error) or first_line(error))  # of this or another rank
            return False
        self._last_saved, self._has_failed = path, False
        if rank() == 0:
            prune(self._directory, self._settings.keep_last, keep_best=self._settings.keep_best)
        return True

    def _say_not_saved(self, path: Path, reason: str) -> None:
        self._has_failed = True
        last = "there is none yet" if self._last_saved is None else f"the last one is {self._last_saved}"
        self._log.info(f"warning: {path} could not be saved: {reason}; {last}; training continues")


def _checked(checkpoint: Path) -> dict[str, Any]:
    """The manifest's facts about a checkpoint, after its files were checked.

    Raises:
        CheckpointError: a file is damaged, or the checkpoint is another one than its name says.
        UserError: it was not written by a training script.
    """
    about = check_training(checkpoint)
    script = about.get("script")
    if not (isinstance(script, dict) and {"settings", "content", "step"} <= script.keys()):
        raise UserError(f"--resume (checkpoint.resume): {checkpoint} was not written by a training script")
    if not (
        isinstance(script["step"], int)
        and isinstance(script["settings"], dict)
        and isinstance(script["content"], dict)
        and isinstance(about.get("versions"), dict)
        and isinstance(about.get("optimizers"), list)
        and all(isinstance(name, str) for name in about["optimizers"])
    ):
        raise CheckpointError(
            f"{checkpoint / MANIFEST} is not what a training script writes. Give an earlier checkpoint."
        )
    if step_of(checkpoint) not in (-1, script["step"]):
        raise CheckpointError(
            f"{checkpoint / MANIFEST} is of another checkpoint: it says step {script['step']}. "
            "Give an earlier checkpoint."
        )
    return about
