"""Bytes of an optimizer's state."""

from moreh.models.architecture import Architecture
from moreh.planner.cost.stage_parameters import StageParameters
from moreh.planner.optimizer_state import state_bytes
from moreh.planner.plan.plan import Training
from moreh.planner.software_profile import SoftwareProfile


def optimizer_bytes_of(trainable: StageParameters, training: Training, software: SoftwareProfile) -> StageParameters:
    """Bytes of optimizer state in the place of the numbers of trainable parameters."""
    optimizer, architecture = training.optimizer, training.architecture

    def bytes_of(values: float) -> float:
        return state_bytes(values, optimizer, software.moment_bytes, software.optimizer_bytes)

    layer_bytes = bytes_of(optimizer.values)
    if optimizer.matrix_values is not None:
        share = matrix_share(architecture)
        layer_bytes = share * bytes_of(optimizer.matrix_values) + (1 - share) * layer_bytes
    others = bytes_of(optimizer.values)
    return StageParameters(
        trainable.layer * layer_bytes,
        trainable.first * others,
        trainable.last * others,
        trainable.experts * layer_bytes,
    )


def matrix_share(architecture: Architecture) -> float:
    """The share of the layers' trainable parameters that are weights of matrices (0 to 1).

    Experts of a mixture that are stacked in one tensor are none.
    """
    kinds = list(architecture.layer_kinds())
    matrices = sum(
        count * linear.copies * linear.inputs * linear.outputs
        for layer, count in kinds
        for linear in layer.linears
        if linear.is_trained_matrix
    )
    return matrices / max(sum(count * layer.trainable_parameters for layer, count in kinds), 1)
