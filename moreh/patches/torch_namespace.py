"""The platform's names in torch: `torch.moreh`, `torch.version.moreh`, and the operators in `torch.ops.moreh`."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from moreh.errors import OptionError
from moreh.patches.patch import Patch

TORCH_MOREH = Patch(
    target="torch.moreh",
    why="Scripts call torch.moreh.option.enable_advanced_parallelization(), as on the MoAI Platform.",
    no_public_way="torch has no registry of extensions that are not devices.",
    tested=("torch 2.11", "torch 2.13", "torch 2.15"),
    adds=True,
)
TORCH_VERSION_MOREH = Patch(
    target="torch.version.moreh",
    why="Scripts recognize the MoAI Platform's torch by torch.version.moreh, and read its version there.",
    no_public_way="torch has no registry of extensions that are not devices.",
    tested=("torch 2.11", "torch 2.13", "torch 2.15"),
    adds=True,
)
# torch's equivalents of the platform's other operators.
INSTEAD = {
    "flash_attention": "torch.nn.functional.scaled_dot_product_attention",
    "T5LayerNorm": "torch.nn.RMSNorm",
    "apply_rotary_emb": "apply_rotary_pos_emb of the model's own file in transformers",
    "Adafactor": "torch.optim.Adafactor",
}
TORCH_OPS_MOREH = Patch(
    target="torch.ops.moreh",
    names=("scaled_dot_product_attention", *INSTEAD),
    why="Models written for the MoAI Platform call its operators: one is a function of torch, the others name what to "
    "use instead.",
    no_public_way="torch.library registers operators with argument types, and those of the platform are not published.",
    tested=("torch 2.11", "torch 2.13", "torch 2.15"),
    adds=True,
)


def add_to_torch(package: ModuleType, version: str) -> None:
    """Let `torch.moreh` be this package and `torch.version.moreh` its version, and add the operators. Once only."""
    from torch.nn import functional

    TORCH_MOREH.install(lambda _: package)
    TORCH_VERSION_MOREH.install(lambda _: version)
    TORCH_OPS_MOREH.install_each(
        lambda name, _: _refused(name) if name in INSTEAD else functional.scaled_dot_product_attention
    )


def _refused(name: str) -> Callable[..., Any]:
    """An operator whose calls raise an OptionError."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OptionError(
            f"torch.ops.moreh.{name} is an operator of the MoAI Platform, which this package does not provide: use "
            f"{INSTEAD[name]} instead"
        )

    return refuse
