"""Attaches this package to torch: the name `torch.moreh` and, on a machine without a GPU, the CUDA face."""

import sys

from moreh.patches.world_variables import hide_from_libraries
from moreh.version import __version__


def attach_to_torch() -> None:
    """Create `torch.moreh`. PyTorch calls this at the end of `import torch`; a second call does nothing.

    Raises:
        OptionError: the environment variable MOREH_CUDA_FACE has a value that is not allowed.
    """
    import torch

    if hasattr(torch, "moreh"):
        return
    hide_from_libraries()
    from moreh import option  # noqa: F401  (torch.moreh.option exists only after this import)
    from moreh.patches.cuda.face import audience_from_environment, install_cuda_face
    from moreh.patches.torch_namespace import add_to_torch

    audience = audience_from_environment()
    # device_count() asks the driver's library without starting CUDA, which would forbid forking later on.
    if torch.cuda.device_count() == 0:
        from moreh.accelerator.job_device import JobDevice

        install_cuda_face(JobDevice(), audience)
    add_to_torch(sys.modules["moreh"], __version__)
