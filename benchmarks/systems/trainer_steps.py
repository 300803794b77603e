"""Settings and the record of steps of transformers' Trainer and of TRL's, which derives from it."""

import time
from typing import Any

import torch
from transformers import TrainerCallback
from workload import IGNORED, Record, Workload

TUNED: dict[str, Any] = {"bf16": True, "optim": "adamw_torch_fused"}


class _StepRecorder(TrainerCallback):
    """Records each step when it has ended."""

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


def common_settings(workload: Workload) -> dict[str, Any]:
    """The settings of the workload; nothing is saved or reported during the training."""
    return {
        "learning_rate": workload.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": workload.weight_decay,
        "max_grad_norm": 1.0,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 10**6,
        "use_cpu": True,
    }


def record_steps(trainer: Any, record: Record) -> None:
    """Let a Trainer record time, label tokens and loss of each step. Its own logs round the loss."""
    recorder = _StepRecorder(record)
    original = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        recorder.label_tokens = int((inputs["labels"][:, 1:] != IGNORED).sum())
        loss = original(model, inputs, *args, **kwargs)
        recorder.loss = loss.detach()
        return loss

    trainer.compute_loss = compute_loss
    trainer.add_callback(recorder)
