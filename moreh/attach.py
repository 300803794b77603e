"""Attaches this package to torch: the name `torch.moreh` and, on a machine without a GPU, the CUDA face."""

import sys


def attach_to_torch() -> None:
    """Make `torch.moreh` available. PyTorch calls this at the end of `import torch`; a second call does nothing."""
    import torch

    if hasattr(torch, "moreh"):
        return
    from moreh import option  # noqa: F401  (torch.moreh.option is there only once it is imported)

    torch.moreh = sys.modules["moreh"]  # type: ignore[attr-defined]
    # device_count() asks the driver's library without starting CUDA, which would forbid forking later on.
    if torch.cuda.device_count() == 0:
        from moreh.patches.cuda.moves import install_moves
        from moreh.patches.cuda.queries import install_probes

        install_probes()
        install_moves()
