"""Steps whose loss is not finite, as the settings say, and losses that jump."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from utils.errors import UserError
from utils.training.loss_guard import LossGuard

BATCHES = [{"locations": ["a.jsonl:3", "a.jsonl:8"]}]


class Log:
    """Keeps the lines of a log."""

    def __init__(self):
        self.lines = []
        self.directory = Path("runs/tiny")

    def info(self, text):
        self.lines.append(text)


class Checkpoints:
    """Counts how often a run goes back."""

    def __init__(self):
        self.count = 0

    def go_back(self, model, optimizer):
        self.count += 1
        return Path("runs/tiny/checkpoints/step-4")


def make_guard(setting):
    log, checkpoints = Log(), Checkpoints()
    config = SimpleNamespace(train=SimpleNamespace(non_finite=setting))
    guard = LossGuard(config, log, 90, checkpoints)
    return (lambda step, loss, norm=1.0: guard.allows(step, loss, norm, BATCHES, None, None)), log, checkpoints


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan)])
def test_default_is_to_stop_with_the_rows_in_the_log(loss, norm):
    allows, log, _ = make_guard("stop")
    assert allows(1, 2.0)
    with pytest.raises(UserError, match=r"step 2: the loss is .* Try a smaller train.lr .*let train.non_finite skip"):
        allows(2, loss, norm)
    assert log.lines == [f"[Step 2/90] | Loss: {loss} | Gradient norm: {norm} | Rows: a.jsonl:3, a.jsonl:8"]


def test_skipped_steps_change_no_weights_until_there_are_three_in_a_row():
    allows, log, checkpoints = make_guard("skip")
    answers = [allows(step, math.nan if step in (2, 3, 5) else 2.0) for step in range(1, 6)]
    assert answers == [True, False, False, True, False]
    assert log.lines[1] == "[Step 2/90] | Skipped: the step does not update the weights"
    assert not allows(6, math.nan)
    with pytest.raises(UserError, match=r"step 7: the loss is nan .*, as in the 2 steps before"):
        allows(7, math.nan)
    assert checkpoints.count == 0


def test_going_back_loads_the_last_checkpoint():
    allows, log, checkpoints = make_guard("go_back")
    assert not allows(5, math.nan)
    assert checkpoints.count == 1
    assert log.lines[-1].endswith("from runs/tiny/checkpoints/step-4; continuing with the next rows")


def test_spikes_are_reported_and_slow_changes_are_not():
    allows, log, _ = make_guard("stop")
    for step in range(60):
        assert allows(step, 8.0 - 0.05 * step + 0.1 * (step % 3))
    assert log.lines == []
    assert allows(60, 9.5)
    (line,) = log.lines
    assert line.startswith("[Step 60/90] | warning: the loss 9.5000 is a spike; the median of the last 10 steps is 5.3")
    assert line.endswith("Rows: a.jsonl:3, a.jsonl:8")
