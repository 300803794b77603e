"""Uses of a sharded model beside its training: a script draws random numbers, moves the model and casts it."""

import random

import numpy as np
import torch

from tests.helpers.batches import batch
from tests.helpers.sharded.cases import error_of, sharded_copy
from tests.helpers.sharded.loop import train


def drawn_after_training(family, plan, **settings):
    """Random numbers of the script after a training and an evaluation: with a whole and with a sharded model."""
    whole, sharded, _ = sharded_copy(family, plan, **settings)
    draws = []
    for model in (whole, sharded):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        train(model, steps=2)
        ids, mask, labels = batch(0, model.config.vocab_size)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, labels=labels)
        draws.append((torch.rand(1).item(), random.random(), np.random.rand()))
    return draws


def moves(plan):
    """The errors for moves and casts of a sharded model, and whether it has kept its tensors and can be trained."""
    _, model, runner = sharded_copy("llama", plan)
    train(model, steps=1)
    before = [id(tensor) for tensor in runner.model.user_params.values()]
    calls = {
        "to cpu": lambda: model.to("cpu"),
        "cpu": lambda: model.cpu(),
        "cuda": lambda: model.to(torch.device("cpu")).cuda(),
        "own dtype": lambda: model.double().to(torch.float64).to("cpu", torch.float64),
        "part": lambda: model.model.layers[0].cpu(),
        "half": lambda: model.half(),
        "bfloat16": lambda: model.to("cpu", torch.bfloat16),
        "part in float": lambda: model.lm_head.float(),
        "meta": lambda: model.to("meta"),
    }
    errors = {name: error_of(call) for name, call in calls.items()}
    is_same = model.to("cpu") is model and before == [id(tensor) for tensor in runner.model.user_params.values()]
    train(model, steps=1)
    return errors, is_same
