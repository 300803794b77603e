"""Whether a model drops anything in training."""

from typing import Any

from torch import nn

from moreh.models.families.config_defaults import DROPOUT_KEYS


def has_dropout(config: Any, modules: nn.Module) -> bool:
    """Whether a model of transformers with this configuration, or a module of these, has a rate of dropout that is not 0."""
    settings = [config, getattr(config, "attn_config", None)]
    rates = [getattr(one, key, None) for one in settings for key in DROPOUT_KEYS]
    return any(rates) or any(
        module.p for module in modules.modules() if isinstance(module, nn.modules.dropout._DropoutNd)
    )
