"""An open shim of the MoAI Platform: `torch.moreh`, a simulated MoAI Accelerator and the tools around it.

The installed package is loaded by `import torch` itself (entry-point group `torch.backends`). Where it is not
installed, or that loading is turned off, `import torch, moreh` does the same. The command-line tools import this
package without torch, so nothing here may import it.
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
