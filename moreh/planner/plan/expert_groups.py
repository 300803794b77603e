"""The possible numbers of groups of experts."""

from math import gcd

from moreh.models.architecture import Architecture


def expert_divisor(architecture: Architecture) -> int:
    """The greatest number that divides the experts of every mixture of a model; 1 for a model without experts."""
    counts = [linear.copies for layer, _ in architecture.layer_kinds() for linear in layer.linears if linear.is_expert]
    return gcd(*counts) or 1
