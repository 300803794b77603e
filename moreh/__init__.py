"""An open shim of the MoAI Platform: `torch.moreh`, a simulated MoAI Accelerator and the tools around it.

The installed package is loaded by `import torch` itself (entry-point group `torch.backends`). Where it is not
installed, or that loading is turned off, `import torch, moreh` does the same. The command-line tools import this
package without torch, so nothing here may import it.
"""

import sys

from moreh.version import __version__

__all__ = ["__version__"]

if "torch" in sys.modules:
    from moreh.attach import attach_to_torch

    attach_to_torch()
