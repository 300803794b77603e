"""A checkpoint whose checksums fit, but whose state of a script is none: one line, whoever has made it."""

import pytest

from moreh.errors import CheckpointError
from utils.training.checkpoint import checkpoints as checkpoints_module

SETTINGS = ("checkpoint.every_steps=2", "checkpoint.every_minutes=null")


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    "change",
    [
        lambda extra: None,
        lambda extra: [],
        lambda extra: without(extra, "scheduler"),
        lambda extra: {**extra, "scheduler": {}},
        lambda extra: {**extra, "scheduler": {**extra["scheduler"], "last_epoch": "many"}},
        lambda extra: {**extra, "random": {}},
        lambda extra: {**extra, "random": {**extra["random"], "torch": 5}},
        lambda extra: {**extra, "random": {**extra["random"], "torch": extra["random"]["torch"][:7]}},
        lambda extra: {**extra, "random": {**extra["random"], "python": (3, (1, 2), None)}},
        lambda extra: {**extra, "random": {**extra["random"], "numpy": (1,)}},
        lambda extra: {**extra, "first_eval_loss": None},
    ],
)
def test_state_that_no_script_writes_is_refused(train, monkeypatch, change):
    train(*SETTINGS)
    original = checkpoints_module.load_training
    monkeypatch.setattr(
        checkpoints_module, "load_training", lambda *args, **options: change(original(*args, **options))
    )
    with pytest.raises(
        CheckpointError, match=r"step-4 has a state that no training script writes \(.*earlier checkpoint"
    ):
        train(*SETTINGS, "checkpoint.resume=auto")
