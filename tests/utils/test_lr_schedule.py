"""The learning rate over the run: the warm-up, the way down, and the scheduler that applies it."""

import pytest
import torch
from transformers import get_wsd_schedule

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


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
def test_wsd_is_that_of_transformers_after_the_warm_up(shape):
    train = TrainSection(steps=50, warmup_steps=4, schedule="wsd", decay_steps=20, decay_shape=shape, min_lr_ratio=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    expected = get_wsd_schedule(optimizer, 4, 20, num_training_steps=50, decay_type=shape, min_lr_ratio=0.1)
    factors = [lr_factor(step, 50, train) for step in range(1, 51)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[3:] == pytest.approx([expected.lr_lambdas[0](step) for step in range(4, 51)])
    assert factors[29] == 1.0 > factors[30]
    assert factors[-1] == pytest.approx(0.1)


def test_wsd_falls_in_the_last_fifth():
    factors = [lr_factor(step, 10, TrainSection(steps=10, schedule="wsd")) for step in range(1, 11)]
    assert factors == [1.0] * 8 + [0.5, 0.0]
