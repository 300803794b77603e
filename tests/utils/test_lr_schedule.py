"""The learning rate over the run: the warm-up, the way down, and the scheduler that applies it."""

import pytest
import torch

from utils.config.schema import TrainSection
from utils.training.lr_schedule import lr_factor, make_scheduler


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_first_step_learns_and_the_last_has_the_lowest_rate(schedule):
    train = TrainSection(steps=20, warmup_steps=4, schedule=schedule, min_lr_ratio=0.1)
    factors = [lr_factor(step, 20, train) for step in range(1, 21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]  # the first step already learns
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert factors[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    if schedule == "linear":
        assert factors[11] == pytest.approx(0.55)

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    scheduler = make_scheduler(optimizer, 20, train)
    used = []
    for _ in range(20):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert used == pytest.approx([2 * factor for factor in factors])


def test_rate_without_warm_up_begins_at_the_top():
    train = TrainSection(steps=1, schedule="linear")
    assert lr_factor(1, 1, train) == 1.0
    assert lr_factor(1, 10, train) == 1.0
    assert lr_factor(10, 10, train) == 0.0
