"""The learning rate over the run.

The schedules of transformers begin a warm-up at 0, so that the first step learns nothing. This one begins above 0.
"""

import math

import torch

from utils.config.schema import TrainSection


def lr_factor(step: int, total_steps: int, train: TrainSection) -> float:
    """The learning rate of a step, counted from 1, as a fraction of `train.lr`.

    The warm-up rises in equal parts: with 4 warm-up steps the factors are 1/4, 2/4, 3/4, 1. After it the factor falls
    to `min_lr_ratio` in the last step.
    """
    if step < train.warmup_steps:
        return step / train.warmup_steps
    if train.schedule == "constant":
        return 1.0
    first = max(train.warmup_steps, 1)
    progress = min((step - first) / max(total_steps - first, 1), 1.0)
    height = 1 - progress if train.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return train.min_lr_ratio + (1 - train.min_lr_ratio) * height


def make_scheduler(
    optimizer: torch.optim.Optimizer, total_steps: int, train: TrainSection
) -> torch.optim.lr_scheduler.LambdaLR:
    """A scheduler whose `step()` is called after each step of the optimizer."""
    # LambdaLR counts the steps that were taken: its count is 0 in step 1.
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda taken: lr_factor(taken + 1, total_steps, train))
