"""Automatic parallel training for single-GPU PyTorch scripts, with the interface of the MoAI Platform.

`import torch` loads the installed package through the entry-point group `torch.backends`, and creates `torch.moreh`.
Without that entry point, `import torch, moreh` does the same. The command-line tools import this package without
torch, so nothing here may import torch.
"""

import sys
from typing import Any

from moreh.version import __version__

__all__ = ["__version__"]


def __getattr__(name: str) -> Any:
    """Raise an AttributeError that names the replacement of an older entry point of the platform."""
    if name in ("pipeline_assign", "MixedPrecisionTrainer"):
        raise AttributeError(
            f"torch.moreh.{name} is an older entry point of the MoAI Platform, which this package does not provide: "
            "call torch.moreh.option.enable_advanced_parallelization() once, before the script creates its model, and "
            "train as on one device"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if "torch" in sys.modules:
    from moreh.attach import attach_to_torch

    attach_to_torch()
