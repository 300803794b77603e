"""Measures throughput and memory of each step, and formats the console line."""

import functools
import math
import re
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any

import psutil
import torch

from moreh.accelerator.job import local_job_if_started
from moreh.accelerator.job_status import JobProgress
from moreh.planner.units import seconds_text
from moreh.runtime.launch.watch.heartbeat import begin_step
from moreh.tables import terminal_width
from utils.config.schema import Config
from utils.data.batches import Batch
from utils.data.labels import count_labels
from utils.errors import DryRunEnd
from utils.logging.run_log import RunLog

# Steps of a dry run; the first, which plans and allocates, does not count.
_DRY_STEPS = 3


class StepMeter:
    """Times steps, and logs one line for every `log.every_steps` of them.

    The time of a step begins before its batches are loaded and ends with `finish`. Evaluation, logging and checkpoints
    are not part of it; they are part of the time that is left. The console counts real tokens, without padding.
    """

    def __init__(self, config: Config, log: RunLog, total_steps: int) -> None:
        self._every, self._log, self._total_steps = config.log.every_steps, log, total_steps
        self._start = time.perf_counter()
        # Totals since the last line on the console.
        self._real_tokens, self._seconds = 0, 0.0
        # When the first step began, and how many steps have ended since.
        self._first_start, self._steps_done = math.nan, 0
        self._evaluations = evaluations_of(config, total_steps)
        self._step_s: list[float] = []

    def timed(self, steps: Iterable[tuple[int, list[Batch]]]) -> Iterator[tuple[int, list[Batch]]]:
        """The same steps, each with the clock started before its batches are loaded, and known to a launcher."""
        iterator = iter(steps)
        while True:
            self._start = time.perf_counter()
            if math.isnan(self._first_start):
                self._first_start = self._start
            step = next(iterator, None)
            if step is None:
                return
            begin_step(step[0], functools.partial(rows_of, step[1]))
            yield step

    def finish(self, step: int, batches: list[Batch], *, loss: float, lr: Any, grad_norm: float) -> dict[str, Any]:
        """Stop the clock; returns the metrics of the step."""
        seconds = time.perf_counter() - self._start
        real_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        label_tokens = sum(count_labels(batch["labels"]) for batch in batches)
        padded_tokens = sum(batch["input_ids"].numel() for batch in batches)
        self._real_tokens += real_tokens
        self._seconds += seconds
        self._steps_done += 1
        if self._log.is_dry:
            self._step_s.append(seconds)
            if len(self._step_s) == _DRY_STEPS or step == self._total_steps:
                raise DryRunEnd(self._dry_report())
        if step % self._every == 0 or step == self._total_steps:
            speed, memory = self._real_tokens / self._seconds, _memory_in_use() / 2**30
            left = self._time_left(step)
            text = (
                f"[Step {step}/{self._total_steps}] {step / self._total_steps:.0%} | Loss: {loss:.4f} | lr {lr:.1e} | "
                f"norm {grad_norm:.2f} | {speed:,.0f} tokens/s | {memory:.1f} GiB{f' | {left} left' if left else ''}"
            )
            self._log.info(text if len(text) <= terminal_width() else shortened(text))
            if (job := local_job_if_started()) is not None:
                job.progress = JobProgress(step, self._total_steps, loss, speed, left)
            self._real_tokens, self._seconds = 0, 0.0
        # JSON has no NaN: a step that changed no weights because of one has no loss.
        finite = {key: value for key, value in (("loss", loss), ("grad_norm", grad_norm)) if math.isfinite(value)}
        return {
            "step": step,
            "lr": lr,
            **finite,
            "real_tokens_per_s": real_tokens / seconds,
            "label_tokens_per_s": label_tokens / seconds,
            "padded_tokens_per_s": padded_tokens / seconds,
            "step_s": seconds,
            "memory_in_use_bytes": _memory_in_use(),
            "memory_bytes": torch.cuda.max_memory_allocated(),
        }

    def _dry_report(self) -> str:
        """A report on the time of the whole run, at the pace of the steps after the first one."""
        step_s = statistics.mean(self._step_s[1:] or self._step_s)
        total = self._total_steps * step_s + self._evaluations * self._log.evaluation_s
        return (
            f"Dry run: a step takes {seconds_text(step_s)} (the first {seconds_text(self._step_s[0])}), an evaluation "
            f"{seconds_text(self._log.evaluation_s)}, and {self._total_steps} steps with {self._evaluations} "
            f"evaluations about {duration_text(total)}; {_memory_in_use() / 2**30:.1f} GiB of memory in use. "
            "Nothing was written."
        )

    def _time_left(self, step: int) -> str:
        """The time left, at the pace until now; empty after the last step."""
        if step == self._total_steps:
            return ""
        pace = (time.perf_counter() - self._first_start) / self._steps_done
        return duration_text(pace * (self._total_steps - step))


def shortened(line: str) -> str:
    """The line of a step with fewer digits of what needs few, so that it stays one line on a console.

    >>> shortened("norm 10.95 | 100,393 tokens/s | 79.8 GiB | 13 h 05 min left")
    'norm 10.9 | 100,393 tok/s | 79 GiB | 13 h left'
    """
    line = re.sub(r"norm ([\d.]+)", lambda found: f"norm {float(found[1]):.3g}", line).replace(" tokens/s", " tok/s")
    line = re.sub(r"(\d\d+)\.\d GiB", r"\1 GiB", line)
    return re.sub(r"(\d+ h) \d\d min left", r"\1 left", line)


def evaluations_of(config: Config, total_steps: int) -> int:
    """Number of evaluations of a run: before the first step, every `log.eval_every_steps`, and after the last step."""
    every = config.log.eval_every_steps or total_steps
    return 1 + total_steps // every + (total_steps % every > 0)


def rows_of(batches: list[Batch]) -> str:
    """The places of the rows of a step, as a message lists them."""
    return ", ".join(location for batch in batches for location in batch["locations"])


def _memory_in_use() -> int:
    """Bytes that the run really holds: the most on a GPU, or those of this process where there is none."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated()
    return int(psutil.Process().memory_info().rss)


def duration_text(seconds: float) -> str:
    """A duration as "45 s", "12 min" or "3 h 05 min".

    >>> duration_text(44.6), duration_text(725), duration_text(11_120)
    ('45 s', '12 min', '3 h 05 min')
    """
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
