"""Whether a model has dropout in training."""

from typing import Any

from torch import nn

from moreh.models.families.hf_config import DROPOUT_KEYS


def has_dropout(config: Any, module: nn.Module) -> bool:
    """Whether a configuration of transformers, or a Dropout inside `module`, has a probability other than 0."""
    # MPT keeps the dropout of its attention in a configuration of its own.
    configs = [config, getattr(config, "attn_config", None)]
    if any(getattr(part, key, None) for part in configs for key in DROPOUT_KEYS):
        return True
    return any(part.p for part in module.modules() if isinstance(part, nn.modules.dropout._DropoutNd))
