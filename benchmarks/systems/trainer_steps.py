"""What a Trainer of transformers and one that is made of it are given alike, and a clock that notes their steps."""

import time
from typing import Any

import torch
from transformers import TrainerCallback
from workload import IGNORED, Record, Workload

TUNED: dict[str, Any] = {"bf16": True, "optim": "adamw_torch_fused"}


class _Clock(TrainerCallback):
    """Notes a step when it has ended."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.start = time.perf_counter()
        self.loss = torch.zeros(())
        self.label_tokens = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        loss, now = self.loss.item(), time.perf_counter()
        self.record.log_step(loss, now - self.start, self.label_tokens)
        self.start = now


def settings_of(work: Workload) -> dict[str, Any]:
    """The workload's settings, and nothing saved or reported on the way."""
    return {
        "learning_rate": work.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": work.weight_decay,
        "max_grad_norm": 1.0,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 10**6,
        "use_cpu": True,
    }


def record_steps(trainer: Any, record: Record) -> None:
    """Let a Trainer note the loss of each step, which its logs have rounded, the label tokens and the time."""
    clock = _Clock(record)
    computed = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        clock.label_tokens = int((inputs["labels"][:, 1:] != IGNORED).sum())
        loss = computed(model, inputs, *args, **kwargs)
        clock.loss = loss.detach()
        return loss

    trainer.compute_loss = compute_loss
    trainer.add_callback(clock)
