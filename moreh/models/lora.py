"""LoRA adapters of PEFT around the matrices that tensor-parallel ranks split."""

from typing import Any

from torch import nn

from moreh.errors import PlanError


def base_matrix(module: nn.Module) -> Any:
    """The matrix that an adapter wraps; the module itself if it is not an adapter."""
    return getattr(module, "base_layer", module)


def lora_pairs(module: nn.Module) -> list[tuple[nn.Linear, nn.Linear]]:
    """The matrices A [rank, inputs] and B [outputs, rank] of each LoRA adapter around a matrix.

    Raises:
        PlanError: the matrix has adapters of another kind.
    """
    if base_matrix(module) is module:
        return []
    lora_a, lora_b = getattr(module, "lora_A", {}), getattr(module, "lora_B", {})
    pairs = [(lora_a[name], lora_b[name]) for name in lora_a]
    known = {id(parameter) for parameter in base_matrix(module).parameters()}
    known |= {id(matrix.weight) for pair in pairs for matrix in pair}
    has_others = any(id(parameter) not in known for parameter in module.parameters())
    if not pairs or has_others or getattr(module, "lora_variant", None):
        raise PlanError(
            f"the adapters of a {type(module).__name__} are not plain LoRA, the only kind that tensor parallelism "
            "splits: use tensor parallelism of size 1"
        )
    return pairs
