"""LoRA adapters around the matrices of a workload's model, the same ones in each system."""

from typing import Any

import torch
from workload import Workload


def with_adapters(model: Any, workload: Workload) -> Any:
    """The model with new adapters in its layers if the workload trains adapters; otherwise the model as it is."""
    if not workload.lora_rank:
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    # all-linear means all matrices but the output layer.
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=workload.lora_rank,
        lora_alpha=2 * workload.lora_rank,
        lora_dropout=0.0,
        target_modules="all-linear",
    )
    return get_peft_model(model, settings)
