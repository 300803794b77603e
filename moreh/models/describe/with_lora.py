"""The architecture of a model with LoRA adapters, from the architecture of the model alone; it needs no torch.

It is what `describe_module` says of the model that PEFT makes. https://arxiv.org/abs/2106.09685
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from moreh.errors import PlanError
from moreh.models.architecture import Architecture, DecoderLayer, Linear

ALL_LINEAR = "all-linear"
# The names of matrices, or all matrices of the layers.
Targets = Sequence[str] | Literal["all-linear"]


@dataclass(frozen=True)
class Lora:
    """LoRA adapters around matrices of the layers: two narrow matrices beside each, all else is frozen."""

    rank: int
    """Outputs of the first matrix of an adapter, and inputs of its second one."""
    targets: Targets = ALL_LINEAR
    """The matrices that get an adapter: their names, such as "q_proj", or the last parts of them."""
    dropout: bool = False
    """True if the input of an adapter passes a dropout of its own."""


def with_lora(architecture: Architecture, lora: Lora) -> Architecture:
    """The architecture with adapters around the matrices of `lora.targets`, and everything else frozen.

    Raises:
        PlanError: a target is not a matrix of the layers.
    """
    # Most layers are one object, and stay one.
    layers = {id(layer): layer for layer in architecture.layers}
    names = {linear.name for layer in layers.values() for linear in layer.linears if _is_module(linear)}
    targets = targeted(names, lora.targets)
    adapted = {identity: _adapted_layer(layer, lora, targets) for identity, layer in layers.items()}
    return replace(
        architecture,
        layers=tuple(adapted[id(layer)] for layer in architecture.layers),
        embedding_frozen=True,
        head_frozen=architecture.head_bias or not architecture.tied,
        frozen_table_parameters=architecture.table_parameters,
        frozen_table_tensors=architecture.table_tensors,
        frozen_final_parameters=architecture.final_parameters,
        frozen_final_tensors=architecture.final_tensors,
    )


def targeted(names: Iterable[str], targets: Targets) -> set[str]:
    """The matrices of a layer that get an adapter, by their names in the layer, such as "self_attn.q_proj".

    As in PEFT, a target is a name, or the last parts of one: "q_proj".

    Raises:
        PlanError: a target is not a matrix of the layers.
    """
    known = set(names)
    if targets == ALL_LINEAR:
        return known
    found = {target: {name for name in known if f".{name}".endswith(f".{target}")} for target in targets}
    unknown = [target for target, matches in found.items() if not matches]
    if unknown:
        last_parts = ", ".join(sorted({name.rpartition(".")[2] for name in known}))
        raise PlanError(
            f"{', '.join(map(repr, unknown))} is not a matrix of the model's layers: give {ALL_LINEAR}, or some of "
            f"{last_parts}"
        )
    return set().union(*found.values())


def _is_module(linear: Linear) -> bool:
    """True if a matrix is a module, or several; adapters are put around modules."""
    return not (linear.bare or linear.stacked)


def _adapted_layer(layer: DecoderLayer, lora: Lora, targets: set[str]) -> DecoderLayer:
    return replace(
        layer,
        linears=tuple(part for linear in layer.linears for part in _adapted(linear, lora, targets)),
        frozen_other_parameters=layer.other_parameters,
        frozen_other_tensors=layer.other_tensors,
    )


def _adapted(linear: Linear, lora: Lora, targets: set[str]) -> Iterator[Linear]:
    """The frozen matrix, and the matrices of its adapter if it gets one."""
    yield replace(linear, frozen=True)
    if linear.name in targets and _is_module(linear):
        first = Linear(
            f"{linear.name}.lora_A.default",
            linear.inputs,
            lora.rank,
            "none",
            copies=linear.copies,
            active=linear.active,
            dropped_input=lora.dropout,
        )
        yield first
        yield replace(
            first,
            name=f"{linear.name}.lora_B.default",
            inputs=lora.rank,
            outputs=linear.outputs,
            dropped_input=False,
        )
