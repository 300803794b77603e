"""Checks whether a model has active dropout, and whether it draws random numbers."""

from typing import Any

from torch import nn

from moreh.models.families.hf_config import drops_elements

# Of configurations: the noise of a router, and the shares of layers and of paths that are skipped.
_RANDOM_KEYS = ("router_jitter_noise", "layerdrop", "drop_path_rate")


def has_dropout(config: Any, module: nn.Module) -> bool:
    """True if a configuration of transformers, or a Dropout inside `module`, has a probability other than 0."""
    # MPT keeps the dropout of its attention in a configuration of its own.
    attention = getattr(config, "attn_config", None)
    if any(drops_elements(vars(part)) for part in (config, attention) if hasattr(part, "__dict__")):
        return True
    return any(part.p for part in module.modules() if isinstance(part, nn.modules.dropout._DropoutNd))


def draws_random_numbers(config: Any, root: nn.Module) -> bool:
    """True if a call of a model draws random numbers now, with its modules in the mode that they are in."""
    is_random = any(getattr(config, key, None) for key in _RANDOM_KEYS) or has_dropout(config, root)
    return is_random and any(module.training for module in root.modules())
