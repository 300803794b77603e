"""The names `torch.moreh`, under which scripts find this package, and `torch.version.moreh`."""

from types import ModuleType

from moreh.patches.patch import Patch

TORCH_MOREH = Patch(
    target="torch.moreh",
    why="Scripts call torch.moreh.option.enable_advanced_parallelization(), as on the MoAI Platform.",
    no_public_way="torch has no registry of extensions that are no devices.",
    tested=("torch 2.13",),
    adds=True,
)
TORCH_VERSION_MOREH = Patch(
    target="torch.version.moreh",
    why="Scripts tell the MoAI Platform's torch by torch.version.moreh, and read its version there.",
    no_public_way="torch has no registry of extensions that are no devices.",
    tested=("torch 2.13",),
    adds=True,
)


def add_to_torch(package: ModuleType, version: str) -> None:
    """Let `torch.moreh` be this package, and `torch.version.moreh` its version. Once in a process."""
    TORCH_MOREH.install(lambda _: package)
    TORCH_VERSION_MOREH.install(lambda _: version)
