"""The work of each rank in the tests of resuming: train, save, load under another plan, and train on."""

import torch

from moreh.runtime.engine.checkpoint_api import load_training, save_training
from tests.helpers.batches import batch, label_positions_rounded_to
from tests.helpers.compare import curve_difference
from tests.helpers.float64 import exact_float64
from tests.helpers.sharded.cases import sharded_copy, weight_difference
from tests.helpers.sharded.loop import adamw
from utils.config.schema import TrainSection
from utils.training.optimizer import make_optimizer

STEPS, STEPS_BEFORE = 4, 2


def train_and_save(family, plan, directory, settings=None):
    """Train some steps under a plan, and write a checkpoint. The losses, norms and learning rates."""
    _, model, _ = sharded_copy(family, plan)
    optimizer, scheduler = _make_optimizer(model, settings)
    curve = _steps(model, optimizer, scheduler, range(STEPS_BEFORE))
    save_training(model, [optimizer], directory, {"scheduler": scheduler.state_dict()}).result()
    return curve


def resume_and_train(family, plan, directory, settings=None):
    """Train the other steps under another plan; the differences from a whole model's training without interruption."""
    whole, model, runner = sharded_copy(family, plan)
    whole_optimizer, whole_scheduler = _make_optimizer(whole, settings)
    _steps(whole, whole_optimizer, whole_scheduler, range(STEPS_BEFORE))
    expected = _steps(whole, whole_optimizer, whole_scheduler, range(STEPS_BEFORE, STEPS))
    optimizer, scheduler = _make_optimizer(model, settings)
    extra = load_training(model, [optimizer], directory)
    scheduler.load_state_dict(extra["scheduler"])
    curve = _steps(model, optimizer, scheduler, range(STEPS_BEFORE, STEPS))
    return curve_difference(curve, expected), weight_difference(runner.model, whole)


def interrupted_is_identical(plan, directory):
    """True if a training that was saved and loaded into a new model ends with the bits of one that went through."""
    weights = []
    for interrupted in (False, True):
        _, model, runner = sharded_copy("llama", plan, attention_dropout=0.2)
        optimizer, scheduler = _make_optimizer(model)
        torch.manual_seed(3)
        _steps(model, optimizer, scheduler, range(STEPS_BEFORE))
        if interrupted:
            state = {"scheduler": scheduler.state_dict(), "random": torch.get_rng_state()}
            save_training(model, [optimizer], directory, state).result()
            _, model, runner = sharded_copy("llama", plan, attention_dropout=0.2)
            optimizer, scheduler = _make_optimizer(model)
            torch.manual_seed(4)
            state = load_training(model, [optimizer], directory)
            scheduler.load_state_dict(state["scheduler"])
            torch.set_rng_state(state["random"])
        _steps(model, optimizer, scheduler, range(STEPS_BEFORE, STEPS))
        weights.append(runner.model.local_tensors())
    straight, interrupted_weights = weights
    # torch.equal is false where there is a NaN.
    return all(torch.equal(straight[name], interrupted_weights[name]) for name in straight)


def _make_optimizer(model, settings=None):
    """AdamW, or the optimizer that a section `train` of settings in JSON names."""
    section = None if settings is None else TrainSection.model_validate_json(settings)
    optimizer = adamw(model.parameters()) if section is None else make_optimizer(model, section)
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)


@label_positions_rounded_to(4)
def _steps(model, optimizer, scheduler, steps):
    """Losses, norms and learning rates of some steps."""
    curve = []
    with exact_float64():
        for step in steps:
            ids, mask, labels = batch(step, model.config.vocab_size)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
            loss.backward()
            curve += [
                loss.item(),
                float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)),
                scheduler.get_last_lr()[0],
            ]
            optimizer.step()
            scheduler.step()
            model.zero_grad()
    return curve
