"""A script's own training loop, and what scripts put into it: optimizers and clipping."""

import torch

from tests.helpers.batches import batch
from utils.config.schema import TrainSection
from utils.training.optimizer import make_optimizer as of_settings


def train(
    model,
    make_optimizer=None,
    clip=None,
    steps=2,
    accumulation=2,
    make_batch=batch,
    settings_of_optimizer=None,
    **model_arguments,
):
    """Train as a script does, and return the losses and norms that it sees. All is made before the first batch.

    `settings_of_optimizer` is the section `train` of settings in JSON, which make the optimizer.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if settings_of_optimizer is None:
        optimizer = (make_optimizer or adamw)(parameters)
    else:
        optimizer = of_settings(model, TrainSection.model_validate_json(settings_of_optimizer))
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, steps)
    clip = clip or clip_all
    curve = []
    for step in range(steps):
        for index in range(accumulation):
            ids, mask, labels = make_batch(accumulation * step + index, model.config.vocab_size)
            outputs = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, **model_arguments)
            (outputs[0] / accumulation).backward()
            curve.append(outputs.loss.item())
        curve.append(float(clip(model, parameters)))
        optimizer.step()
        scheduler.step()
        model.zero_grad(set_to_none=True)
    return curve


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3)


def fused_adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3, fused=True)


def sgd_with_momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)


def two_groups(parameters):
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() <= 1]
    return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2, eps=1e-3)


class Layerwise(torch.optim.Optimizer):
    """An optimizer that looks at whole matrices: it moves each by a share of its norm, as LARS does."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-2})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    ratio = parameter.norm() / (parameter.grad.norm() + 1e-6)
                    parameter.sub_(parameter.grad * ratio * group["lr"])


def clip_all(model, parameters):
    return torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)


def clip_listed(model, parameters):
    """Clip a list that was made before the model was sharded."""
    return torch.nn.utils.clip_grad_norm_(parameters, 0.5)


def clip_largest(model, parameters):
    return torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01, norm_type=float("inf"))


def clip_output_layer(model, parameters):
    return torch.nn.utils.clip_grad_norm_(model.get_output_embeddings().parameters(), 0.1)


def freeze_some(model):
    """Let the embeddings and every second layer keep their weights."""
    for name, parameter in model.named_parameters():
        if "embed" in name or "wte" in name or ".1." in name:
            parameter.requires_grad_(False)
    return model
