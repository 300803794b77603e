"""LoRA adapters of PEFT around the matrices that tensor-parallel ranks divide."""

from typing import Any

from torch import nn

from moreh.errors import PlanError


def base_matrix(module: nn.Module) -> Any:
    """The matrix that an adapter is around; the module itself without one."""
    return getattr(module, "base_layer", module)


def lora_pairs(module: nn.Module) -> list[tuple[nn.Linear, nn.Linear]]:
    """The matrices A [rank, inputs] and B [outputs, rank] of each adapter of a matrix.

    Raises:
        PlanError: the matrix has other adapters.
    """
    if base_matrix(module) is module:
        return []
    down, up = getattr(module, "lora_A", {}), getattr(module, "lora_B", {})
    pairs = [(down[name], up[name]) for name in down]
    known = {id(parameter) for parameter in base_matrix(module).parameters()}
    known |= {id(matrix.weight) for pair in pairs for matrix in pair}
    if (
        not pairs
        or any(id(parameter) not in known for parameter in module.parameters())
        or getattr(module, "lora_variant", None)
    ):
        raise PlanError(
            f"the adapters of a {type(module).__name__} are none of plain LoRA, the only kind that tensor parallelism divides: "
            "use tensor parallelism of size 1"
        )
    return pairs
