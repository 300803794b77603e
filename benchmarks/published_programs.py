"""The cells of a published run, and the software profile of its program."""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import replace

from moreh.planner.software_profile import SoftwareProfile

# A line of a file of published runs. Any cell may be missing, empty or nonsense.
RunRow = Mapping[str, str]

# The largest count that is believed: more is a typing error. A model is held in memory layer by layer, so that the
# limit on layers is lower.
MAX_COUNT = 10**9
MAX_COUNT_OF_COLUMN = {"layers": 10_000}


class Unusable(Exception):
    """A row lacks what a prediction needs, or describes what is not modeled."""


def cell(row: RunRow, column: str) -> str:
    """The text of a cell, empty where the row has none."""
    return (row.get(column) or "").strip()


def number(row: RunRow, column: str) -> float | None:
    """The number in a cell, which may be infinite; None if the cell is empty or NaN.

    Raises:
        Unusable: it is not a number.
    """
    text = cell(row, column)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise Unusable(f"{column}={reprlib.repr(text)} is not a number") from None
    return None if math.isnan(value) else value


def measurement(row: RunRow, column: str) -> float | None:
    """A positive finite number; None if the cell has none. A rate may have been rounded to 0."""
    value = number(row, column)
    return value if value is not None and 0 < value < math.inf else None


def optional(row: RunRow, column: str) -> int | None:
    """A count; None if it is not given. 8.0 counts as 8.

    Raises:
        Unusable: it is not a whole number, it is below 1, or it is beyond belief.
    """
    value, maximum = number(row, column), MAX_COUNT_OF_COLUMN.get(column, MAX_COUNT)
    if value is None:
        return None
    if not 1 <= value <= maximum or value != int(value):
        raise Unusable(f"{column}={reprlib.repr(cell(row, column))} is not a whole number from 1 to {maximum:,}")
    return int(value)


def required(row: RunRow, column: str) -> int:
    """A count that must be given.

    Raises:
        Unusable: it is not given, or `optional` refuses it.
    """
    value = optional(row, column)
    if value is None:
        raise Unusable(f"{column} is not given")
    return value


def software_of(row: RunRow) -> SoftwareProfile:
    """The profile of a row's program.

    Most traits are how these programs are documented to work. Some were chosen by hand so that published figures,
    tested ones included, come out right:

    - torchtitan: `fragmentation` and, in 2025, `logit_bytes`
    - OneFlow: `min_in_flight` (from the memory of rows 610 and 612) and `elementwise_traffic`
    - DeepSpeed: `rings_use_all_ports`

    `elementwise_traffic` of the other programs is a guess.
    """
    framework, precision, sharding = cell(row, "framework"), cell(row, "precision").lower(), cell(row, "sharding")
    # arXiv:2205.05198: float16 weights and a master copy; fused softmax, bias and dropout.
    megatron = SoftwareProfile(
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
        software = SoftwareProfile("llm-foundry", logit_bytes=4, logit_traffic_bytes=8)
        software = replace(software, reduce_bytes=2 if "PURE" in sharding else 4)
        if "PURE" in sharding:
            software = replace(software, weight_bytes=2, gradient_bytes=2, optimizer_bytes=4, weight_copy_bytes=0)
    elif "torchtitan" in framework:
        software = _torchtitan(row)
    elif "SimuMax" in framework:
        # With a fused cross-entropy.
        software = replace(
            megatron, name="Megatron Core", fused_attention=True, elementwise_traffic=0.6, reduce_bytes=4
        )
        software = replace(software, logit_bytes=6, logit_traffic_bytes=12)
    elif "ZeRO-3" in framework:
        software = replace(megatron, name="DeepSpeed", overlaps_data_parallel=True, rings_use_all_ports=False)
    elif "OneFlow" in framework:
        software = replace(megatron, name="OneFlow", overlaps_data_parallel=True)
        software = replace(software, min_in_flight=4, elementwise_traffic=0.4)
    elif "MoAI" in framework:
        software = SoftwareProfile("MoAI Platform")
    else:
        software = megatron
    if "fp8" in precision or "float8" in precision:
        software = replace(software, compute="float8")
    return software


def _torchtitan(row: RunRow) -> SoftwareProfile:
    """torchtitan, arXiv:2410.06511. Its selective recomputation repeats every second matmul."""
    framework = cell(row, "framework")
    software = SoftwareProfile(
        "torchtitan", recomputed_matmuls=0.5, overlaps_tensor_parallel="async" in framework.lower(), gated_copies=1.0
    )
    if "compile" in framework:
        software = replace(software, elementwise_traffic=0.5, gated_copies=0.5)
    if "2025" in cell(row, "group"):
        # Taken to mean that the loss is compiled and the allocator's segments can grow.
        return replace(software, logit_bytes=6, logit_traffic_bytes=12)
    return replace(software, fragmentation=0.25)
