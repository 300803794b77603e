"""The name `torch.moreh`, under which scripts find this package."""

from types import ModuleType

from moreh.patches.patch import Patch

TORCH_MOREH = Patch(
    target="torch.moreh",
    why="Scripts call torch.moreh.option.enable_advanced_parallelization(), as on the MoAI Platform.",
    no_public_way="torch has no registry of extensions that are no devices.",
    tested=("torch 2.13",),
    adds=True,
)


def add_to_torch(package: ModuleType) -> None:
    """Let `torch.moreh` be this package. Once in a process."""
    TORCH_MOREH.install(lambda _: package)
