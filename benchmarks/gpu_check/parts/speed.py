"""Speed and peak memory of a workload on a system: cases are WORKLOAD/SYSTEM, each in a process of its own.

All systems get the same weights, and the same rows unless they choose their own order. Label tokens per second are
those of the steps that count, without the few that a compilation has made five times as long as the median.
"""

import os
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from gpu_check.parts.machine import synchronize
from gpu_check.parts.workloads import Workload, batch_of, make_workload, model_flops
from gpu_check.settings import Result, Settings

COMPILATION_FACTOR = 5
GIB = 2**30
# Steps without padding that the prediction is compared with.
FULL_STEPS = 3


@dataclass
class Meter:
    """The steps of a run, each timed from when everything before it is computed."""

    workload: Workload
    """The workload to train."""
    settings: Settings
    """Number of steps that count."""
    seconds: list[float] = field(default_factory=list)
    """Seconds of each step, the first ones included."""
    label_tokens: list[int] = field(default_factory=list)
    """Label tokens of each step."""
    flops: list[float] = field(default_factory=list)
    """FLOPs of each step."""
    losses: list[float] = field(default_factory=list)
    """The loss of each step."""
    _start: float = 0.0

    def begin(self) -> None:
        """A step begins."""
        synchronize(self.settings)
        self._start = time.perf_counter()

    def end(self, loss: float, label_tokens: int, flops: float) -> None:
        """The step has ended."""
        synchronize(self.settings)
        self.seconds.append(time.perf_counter() - self._start)
        self.label_tokens.append(label_tokens)
        self.flops.append(flops)
        self.losses.append(loss)

    @property
    def is_done(self) -> bool:
        """True if enough steps have been measured."""
        counting = self.seconds[self.settings.warm_up_steps :]
        return len(counting) >= self.settings.max_steps or sum(counting) >= self.settings.max_seconds

    def figures(self) -> dict[str, Any]:
        """The figures of the steps that count."""
        first = self.settings.warm_up_steps
        steps = list(zip(self.seconds, self.label_tokens, self.flops, strict=True))[first:]
        limit = COMPILATION_FACTOR * statistics.median(seconds for seconds, _, _ in steps)
        kept = [step for step in steps if step[0] <= limit]
        seconds = sum(step[0] for step in kept)
        figures: dict[str, Any] = {
            "label tokens/s": sum(step[1] for step in kept) / seconds,
            "step s": statistics.median(step[0] for step in kept),
            "peak GiB": peak_bytes(self.settings) / GIB,
            "first step s": self.seconds[0],
            "loss of step 1": self.losses[0],
            "steps": len(kept),
            "slow steps left out": len(steps) - len(kept),
            "model TFLOP/s": sum(step[2] for step in kept) / seconds / 1e12,
        }
        rate = self.settings.scratch / "matmul_rate.txt"
        if rate.is_file():
            figures["share of the matmul rate"] = figures["model TFLOP/s"] * 1e12 / float(rate.read_text())
        return figures


def run(case: str, settings: Settings) -> Result:
    """Train a workload on a system, and measure it.

    Raises:
        Skipped: the system is not installed, or the workload does not fit.
    """
    from gpu_check.parts.systems import SYSTEMS

    name, system = case.split("/")
    workload = make_workload(name, settings)
    meter = Meter(workload, settings)
    if not settings.dry:
        torch.cuda.reset_peak_memory_stats()
    more = SYSTEMS[system](meter)
    finite = all(loss == loss and abs(loss) != float("inf") for loss in meter.losses)
    return Result(finite, {**meter.figures(), **more}, "" if finite else "a loss is not finite")


def peak_bytes(settings: Settings) -> int:
    """The most memory that torch has allocated on the GPU; in the dry mode that of the process."""
    if settings.dry:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


def train_loop(meter: Meter, model: Any, optimizer: torch.optim.Optimizer, *, autocast: bool, trim: bool) -> None:
    """The loop of a script: forward, backward, clipping, optimizer. `trim` pads to the longest row of a batch."""
    workload, settings = meter.workload, meter.settings
    step = 0
    while not meter.is_done:
        batch = batch_of(workload, step)
        length = max(batch.lengths) if trim else workload.length
        rows = {name: tensor[:, :length] for name, tensor in vars(batch).items()}
        meter.begin()
        inputs = {name: tensor.to(settings.device) for name, tensor in rows.items()}
        with torch.autocast(settings.device, torch.bfloat16, enabled=autocast):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.end(loss.item(), batch.label_tokens, model_flops(workload, batch))
        step += 1


def predicted_beside_measured(meter: Meter, model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The predicted and the measured time of steps with rows without padding."""
    from moreh.accelerator.job import local_job

    plans = [plan for plan in local_job().chosen_plans.values() if plan.devices.startswith("this machine")]
    if not plans:
        return {}
    settings, workload = meter.settings, meter.workload
    predicted_s, predicted_bytes = plans[-1].step_time_s, plans[-1].memory_bytes
    if not settings.dry:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for step in range(1 + FULL_STEPS):
        inputs = batch_of(workload, step, full=True).to(settings.device)
        synchronize(settings)
        start = time.perf_counter()
        model(**inputs, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(settings)
        seconds.append(time.perf_counter() - start)
    measured_s, measured_bytes = statistics.median(seconds[1:]), peak_bytes(settings)
    return {
        "full rows: predicted s": predicted_s,
        "measured s": measured_s,
        "prediction off by": f"{predicted_s / measured_s - 1:+.0%}",
        "predicted GiB": predicted_bytes / GIB,
        "measured GiB": measured_bytes / GIB,
        "memory off by": f"{predicted_bytes / measured_bytes - 1:+.0%}",
    }


def without_libraries_that_report() -> None:
    """No system may ask a server, or report to one."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_DISABLED": "true", "TOKENIZERS_PARALLELISM": "false"}
