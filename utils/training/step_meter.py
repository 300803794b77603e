"""Measures the steps of a run: tokens per second, memory, and the line that the console shows."""

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from utils.config.schema import Config
from utils.data.batches import Batch
from utils.data.labels import count_labels
from utils.errors import UserError
from utils.logging.run_log import RunLog


class StepMeter:
    """Times steps, and logs one line for every `log.every_steps` of them.

    The time of a step begins before its batches are loaded and ends with `finish`. Evaluation, logging and checkpoints
    are not part of it. The console counts real tokens, without padding.
    """

    def __init__(self, config: Config, log: RunLog, total_steps: int) -> None:
        self._every, self._log, self._total_steps = config.log.every_steps, log, total_steps
        self._start = time.perf_counter()
        # Totals since the last line on the console.
        self._real_tokens, self._seconds = 0, 0.0

    def timed(self, steps: Iterable[tuple[int, list[Batch]]]) -> Iterator[tuple[int, list[Batch]]]:
        """The same steps, each with the clock started before its batches are loaded."""
        iterator = iter(steps)
        while True:
            self._start = time.perf_counter()
            step = next(iterator, None)
            if step is None:
                return
            yield step

    def require_finite(self, step: int, loss: float, grad_norm: float, batches: list[Batch]) -> None:
        """Stop the run at a loss or gradient that is not finite, with the rows of the step in the log.

        Raises:
            UserError: the loss or the gradient norm is not finite.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        rows = ", ".join(location for batch in batches for location in batch["locations"])
        self._log.info(f"[Step {step}/{self._total_steps}] | Loss: {loss} | Gradient norm: {grad_norm} | Rows: {rows}")
        raise UserError(
            f"step {step}: the loss is {loss} and the gradient norm {grad_norm}. Try a smaller train.lr or a longer "
            f"train.warmup_steps, or look at the rows of the step in {self._log.directory / 'train.log'}"
        )

    def finish(self, step: int, batches: list[Batch], *, loss: float, lr: Any, grad_norm: float) -> dict[str, Any]:
        """Stop the clock; returns the metrics of the step."""
        seconds = time.perf_counter() - self._start
        real_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        label_tokens = sum(count_labels(batch["labels"]) for batch in batches)
        padded_tokens = sum(batch["input_ids"].numel() for batch in batches)
        self._real_tokens += real_tokens
        self._seconds += seconds
        if step % self._every == 0 or step == self._total_steps:
            self._log.info(
                f"[Step {step}/{self._total_steps}] | Loss: {loss:.4f} | Duration: {self._seconds:.2f} sec | "
                f"Throughput: {self._real_tokens / self._seconds:.2f} tokens/sec"
            )
            self._real_tokens, self._seconds = 0, 0.0
        return {
            "step": step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "real_tokens_per_s": real_tokens / seconds,
            "label_tokens_per_s": label_tokens / seconds,
            "padded_tokens_per_s": padded_tokens / seconds,
            "memory_bytes": torch.cuda.max_memory_allocated(),
        }
