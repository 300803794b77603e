"""Handles steps with a non-finite loss or gradient norm, and reports loss spikes."""

import itertools
import math
import statistics
from collections import deque
from typing import Any

from utils.config.schema import Config
from utils.data.batches import Batch
from utils.errors import UserError
from utils.logging.run_log import RunLog
from utils.training.checkpoint.checkpoints import Checkpoints
from utils.training.step_meter import rows_of

# This many non-finite steps in a row end the run: the weights are not finite, or the learning rate is far too high.
MAX_IN_A_ROW = 3
# A loss is a spike if it exceeds the median of the last _MEDIAN_STEPS losses by _MIN_CHANGES median changes between
# steps, and by _MIN_SHARE of the median. Changes are measured over at least _MIN_STEPS and at most _WINDOW steps.
_WINDOW, _MIN_STEPS, _MEDIAN_STEPS = 50, 20, 10
_MIN_CHANGES, _MIN_SHARE = 10, 0.2


class LossGuard:
    """Decides for each step whether the optimizer may take it, as `train.non_finite` says."""

    def __init__(self, config: Config, log: RunLog, total_steps: int, checkpoints: Checkpoints) -> None:
        self._setting, self._log, self._total_steps = config.train.non_finite, log, total_steps
        self._checkpoints = checkpoints
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._in_a_row = 0

    def allows(
        self, step: int, loss: float, grad_norm: float, batches: list[Batch], model: Any, optimizer: Any
    ) -> bool:
        """True if the optimizer may take a step; if not, the weights may now be those of the last checkpoint.

        Raises:
            UserError: the loss or the gradient norm is not finite, and `train.non_finite` is "stop", or so were those
                of the steps before.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._in_a_row = 0
            self._report_spike(step, loss, batches)
            return True
        self._in_a_row += 1
        place, rows = f"[Step {step}/{self._total_steps}]", rows_of(batches)
        self._log.info(f"{place} | Loss: {loss} | Gradient norm: {grad_norm} | Rows: {rows}")
        if self._setting == "stop" or self._in_a_row == MAX_IN_A_ROW:
            again = "" if self._setting == "stop" else f", as in the {MAX_IN_A_ROW - 1} steps before"
            raise UserError(
                f"step {step}: the loss is {loss} and the gradient norm {grad_norm}{again}. Try a smaller train.lr or "
                f"a longer train.warmup_steps, look at the rows of the step in {self._log.directory / 'train.log'}, or "
                "let train.non_finite skip such steps"
            )
        if self._setting == "go_back":
            checkpoint = self._checkpoints.go_back(model, optimizer)
            self._log.info(
                f"{place} | Restored weights and optimizer state from {checkpoint}; continuing with the next rows"
            )
        else:
            self._log.info(f"{place} | Skipped: the step does not update the weights")
        return False

    def _report_spike(self, step: int, loss: float, batches: list[Batch]) -> None:
        if len(self._losses) >= _MIN_STEPS:
            losses = list(self._losses)
            median = statistics.median(losses[-_MEDIAN_STEPS:])
            change = statistics.median(abs(later - earlier) for earlier, later in itertools.pairwise(losses))
            if loss > median + max(_MIN_CHANGES * change, _MIN_SHARE * abs(median)):
                self._log.info(
                    f"[Step {step}/{self._total_steps}] | warning: the loss {loss:.4f} is a spike; the median of the "
                    f"last {_MEDIAN_STEPS} steps is {median:.4f} | Rows: {rows_of(batches)}"
                )
        self._losses.append(loss)
