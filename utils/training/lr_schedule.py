"""Learning-rate schedules.

The schedules of transformers begin a warm-up at 0, so that the first step learns nothing. This one begins above 0.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from utils.config.schema import TrainSection

# The share of the steps that the decay of the schedule wsd takes, if `train.decay_steps` is not given.
_DEFAULT_DECAY_SHARE = 0.2
# The learning rate between `min_lr_ratio` (0) and `train.lr` (1), by the progress of the decay (0 to 1).
_DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
}


def lr_factor(step: int, total_steps: int, train: TrainSection) -> float:
    """The learning rate of a step, counted from 1, as a fraction of `train.lr`.

    The warm-up is linear: with 4 warm-up steps the factors are 1/4, 2/4, 3/4, 1. Then the factor decays to
    `min_lr_ratio` in the last step.
    """
    if step < train.warmup_steps:
        return step / train.warmup_steps
    if train.schedule == "constant":
        return 1.0
    shape: str = train.schedule
    first = max(train.warmup_steps, 1)
    if train.schedule == "wsd":
        shape, first = train.decay_shape, max(first, total_steps - decay_steps(total_steps, train))
    progress = min(max(step - first, 0) / max(total_steps - first, 1), 1.0)
    return train.min_lr_ratio + (1 - train.min_lr_ratio) * _DECAY_SHAPES[shape](progress)


def decay_steps(total_steps: int, train: TrainSection) -> int:
    """Number of steps of the decay of the schedule wsd."""
    return max(round(total_steps * _DEFAULT_DECAY_SHARE), 1) if train.decay_steps is None else train.decay_steps


def make_scheduler(
    optimizer: torch.optim.Optimizer, total_steps: int, train: TrainSection
) -> torch.optim.lr_scheduler.LambdaLR:
    """A scheduler whose `step()` is called after each step of the optimizer."""
    # LambdaLR counts the steps that were taken: its count is 0 in step 1.
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda taken: lr_factor(taken + 1, total_steps, train))


def restore_scheduler(scheduler: Any, optimizer: Any, state: dict[str, Any]) -> None:
    """Continue the scheduler after the steps that were taken, with the learning rate of the settings.

    They are those of the checkpoint unless the user has changed them.
    """
    highest, taken = scheduler.base_lrs, state["last_epoch"]
    rates = [rate * factor(taken) for rate, factor in zip(highest, scheduler.lr_lambdas, strict=True)]
    scheduler.load_state_dict({**state, "base_lrs": highest, "_last_lr": rates})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
