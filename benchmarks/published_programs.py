"""The cells of a published run, and its program as an software: what it computes with and what it keeps in memory."""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import replace

from moreh.planner.software_profile import SoftwareProfile

# A line of a file of published runs. Any cell may be missing, empty or nonsense.
Row = Mapping[str, str]

# The largest count that is believed: more is a slip, and a model is held in memory layer by layer.
MOST = 10**9
MOST_OF_COLUMN = {"layers": 10_000}


class Unusable(Exception):
    """A row lacks what a prediction needs, or describes what is not modelled."""


def cell(row: Row, column: str) -> str:
    """The text of a cell, empty where the row has none."""
    return (row.get(column) or "").strip()


def number(row: Row, column: str) -> float | None:
    """The number in a cell, perhaps an infinite one; None where it is empty or NaN.

    Raises:
        Unusable: it is no number.
    """
    text = cell(row, column)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise Unusable(f"{column}={reprlib.repr(text)} is no number") from None
    return None if math.isnan(value) else value


def measurement(row: Row, column: str) -> float | None:
    """A positive number; None where the cell has none, such as the 0 that a rounded rate becomes."""
    value = number(row, column)
    return value if value is not None and 0 < value < math.inf else None


def optional(row: Row, column: str) -> int | None:
    """A count; None where it is not given. 8.0 is 8.

    Raises:
        Unusable: it is no whole number, below 1, or beyond belief.
    """
    value, most = number(row, column), MOST_OF_COLUMN.get(column, MOST)
    if value is None:
        return None
    if not 1 <= value <= most or value != int(value):
        raise Unusable(f"{column}={reprlib.repr(cell(row, column))} is no whole number from 1 to {most:,}")
    return int(value)


def required(row: Row, column: str) -> int:
    """A count that must be given.

    Raises:
        Unusable: it is not given, or `optional` refuses it.
    """
    value = optional(row, column)
    if value is None:
        raise Unusable(f"{column} is not given")
    return value


def software_of(row: Row) -> SoftwareProfile:
    """What the program of a row does.

    Most of it is how these programs are documented to work. Chosen by hand so that published figures, tested ones included,
    come out right are: torchtitan's `fragmentation` and, in 2025, its `logit_bytes`; OneFlow's `min_in_flight` (from the
    memory of rows 610 and 612) and `elementwise_traffic`; and DeepSpeed's `rings_use_all_ports`. `elementwise_traffic` of the others is a
    guess.
    """
    framework, precision, sharding = cell(row, "framework"), cell(row, "precision").lower(), cell(row, "sharding")
    megatron = SoftwareProfile(  # arXiv:2205.05198: float16 weights and a master copy, fused softmax, bias and dropout
        "Megatron",
        weight_bytes=2,
        weight_copy_bytes=0,
        gradient_bytes=4,
        optimizer_bytes=12,
        reduce_bytes=2,
        fused_attention=False,
        elementwise_traffic=0.7,
        logit_traffic_bytes=20,
        overlaps_data_parallel=False,
    )
    if "llm-foundry" in framework:
        # Its loss is the fused one of FlashAttention, which writes the gradient over the logits.
        found = SoftwareProfile("llm-foundry", logit_bytes=4, logit_traffic_bytes=8)
        found = replace(found, reduce_bytes=2 if "PURE" in sharding else 4)
        if "PURE" in sharding:
            found = replace(found, weight_bytes=2, gradient_bytes=2, optimizer_bytes=4, weight_copy_bytes=0)
    elif "torchtitan" in framework:
        found = _torchtitan(row)
    elif "SimuMax" in framework:
        found = replace(megatron, name="Megatron Core", fused_attention=True, elementwise_traffic=0.6, reduce_bytes=4)
        found = replace(found, logit_bytes=6, logit_traffic_bytes=12)  # fused cross-entropy
    elif "ZeRO-3" in framework:
        found = replace(megatron, name="DeepSpeed", overlaps_data_parallel=True, rings_use_all_ports=False)
    elif "OneFlow" in framework:
        found = replace(megatron, name="OneFlow", overlaps_data_parallel=True, min_in_flight=4, elementwise_traffic=0.4)
    elif "MoAI" in framework:
        found = SoftwareProfile("MoAI Platform")
    else:
        found = megatron
    if "fp8" in precision or "float8" in precision:
        found = replace(found, compute="float8")
    return found


def _torchtitan(row: Row) -> SoftwareProfile:
    """torchtitan, arXiv:2410.06511: selective recomputation repeats every second matrix product."""
    framework = cell(row, "framework")
    found = SoftwareProfile(
        "torchtitan", recomputed_matmuls=0.5, overlaps_tensor_parallel="async" in framework.lower(), gated_copies=1.0
    )
    if "compile" in framework:
        found = replace(found, elementwise_traffic=0.5, gated_copies=0.5)
    if "2025" in cell(row, "group"):  # taken to mean that the loss is compiled and the allocator's segments can grow
        return replace(found, logit_bytes=6, logit_traffic_bytes=12)
    return replace(found, fragmentation=0.25)
