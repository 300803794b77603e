"""Installs the CUDA face on a machine without a GPU, depending on MOREH_CUDA_FACE.

- unset: scripts see the accelerator in torch.cuda, libraries see that there is no GPU. A script is what stands
  neither in the standard library nor in a directory of installed packages.
- `1`: libraries see the accelerator too, except torch and this package. For code of the user's that is installed in
  site-packages, where it would be taken for a library. A library may then choose a CUDA path that a CPU build lacks.
- `0`: nobody sees the accelerator, and `.cuda()` fails as it does without this package.

With a real GPU there is no face, whatever the variable says.
"""

import os
import warnings
from enum import Enum

from moreh.errors import OptionError
from moreh.patches.cuda.device_types import install_device_types
from moreh.patches.cuda.factories import install_factories
from moreh.patches.cuda.moves import install_moves
from moreh.patches.cuda.queries import install_queries
from moreh.patches.cuda.simulated_device import SimulatedDevice

VARIABLE = "MOREH_CUDA_FACE"


class Audience(Enum):
    """Whose questions to torch.cuda are answered for the accelerator."""

    NOBODY = "0"
    """Nobody's: the face is not installed."""
    SCRIPTS = ""
    """Scripts; libraries get torch's own answers."""
    EVERYBODY = "1"
    """All code but torch and this package."""


def audience_from_environment() -> Audience:
    """The value of MOREH_CUDA_FACE.

    Raises:
        OptionError: its value is neither 0 nor 1.
    """
    text = os.environ.get(VARIABLE, "").strip()
    try:
        return Audience(text)
    except ValueError:
        raise OptionError(
            f"{VARIABLE}={text!r}: expected 0 (nobody sees the accelerator in torch.cuda) or 1 (libraries see it "
            "too); if unset, scripts alone see it"
        ) from None


def install_cuda_face(device: SimulatedDevice, audience: Audience) -> None:
    """Let torch.cuda, and the functions of torch that take a device, mean a simulated device. Once in a process."""
    if audience is Audience.NOBODY:
        return
    install_queries(device, for_all_callers=audience is Audience.EVERYBODY)
    install_factories(device)
    install_moves(device)
    install_device_types()
    # Pinned memory makes copies to a GPU faster; here there is nothing to copy to, and a DataLoader says so every time.
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator is found")
