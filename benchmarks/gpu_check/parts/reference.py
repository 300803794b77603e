"""Losses and gradients without the line, which `correctness` compares with: cases are PRECISION/FAMILY."""

import contextlib
from pathlib import Path
from typing import Any

import torch

from gpu_check.parts.families import VOCABULARY, make_model
from gpu_check.rows import Batch, make_batch
from gpu_check.settings import Result, Settings


def run(case: str, settings: Settings) -> Result:
    """Compute a family in plain transformers, and store the results."""
    precision, family = case.split("/")
    model = make_model(family, settings)
    loss, gradients, _ = loss_and_gradients(model, settings, autocast=precision == "bfloat16")
    torch.save({"loss": loss, "gradients": gradients}, path_of(case, settings))
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    return Result(finite, {"loss": loss}, "" if finite else "a gradient is not finite")


def path_of(case: str, settings: Settings) -> Path:
    """The file of a reference."""
    return settings.scratch / f"reference-{case.replace('/', '-')}.pt"


def batch_of(settings: Settings) -> Batch:
    """The padded batch that all families are computed with."""
    return make_batch(0, VOCABULARY, settings.rows, settings.length, settings.length // 3)


def loss_and_gradients(
    model: Any, settings: Settings, *, autocast: bool
) -> tuple[float, dict[str, torch.Tensor], type[Any]]:
    """The loss of the batch, the gradients by name on the CPU, and the class of the model's outputs."""
    batch = batch_of(settings).to(settings.device)
    context = torch.autocast(settings.device, torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        outputs = model(**batch, use_cache=False)
    outputs.loss.backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return float(outputs.loss), gradients, type(outputs)
