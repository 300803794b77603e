"""The cells of a published run, and the software profile of its program."""

import math
import re
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
    """A row lacks an input of the prediction, or has a mechanism that is not modeled."""


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


# The year before DeepSpeed's version 0.6.
LAST_YEAR_OF_WAITING_STREAMS = 2021

# Names of programs in the column `framework`, in the order in which they are tried.
_PROGRAMS = (
    (r"llm-?foundry", "llm-foundry"),
    (r"torchtitan", "torchtitan"),
    (r"simumax", "Megatron Core"),
    (r"megatron-deepspeed", "Megatron-DeepSpeed"),
    (r"megatron-lm", "Megatron-LM"),
    (r"zero-3", "DeepSpeed ZeRO-3"),
    (r"oneflow", "OneFlow"),
    (r"moai", "MoAI Platform"),
)


def program_of(row: RunRow) -> str:
    """The program of a row, without its version: the unit that is left out of the fit to test on a new program."""
    framework = cell(row, "framework")
    for pattern, name in _PROGRAMS:
        if re.search(pattern, framework.lower()):
            return name
    # The first words, without a version.
    return re.split(r"\s+v?[\d(@]", framework)[0].strip() or "unknown"


def software_of(row: RunRow, compute: str) -> SoftwareProfile:
    """The profile of a row's program: how it is documented to work, or how programs of its devices' age usually do.

    `compute` is the precision, as in a `SoftwareProfile`. No trait is chosen from a published figure.
    """
    framework, sharding = cell(row, "framework"), cell(row, "sharding")
    name = framework.lower()
    fsdp = re.search(r"[fh]sdp|(full|hybrid)[-_ ]?shard", f"{framework} {sharding}".lower()) is not None
    zero_3 = re.search(r"(zero|stage)[-_ ]*(stage)?[-_ ]*3", f"{framework} {sharding}".lower()) is not None
    if "llm-foundry" in framework:
        # Its loss is the fused one of FlashAttention, which writes the gradient over the logits.
        software = SoftwareProfile("llm-foundry", logit_bytes=4, logit_traffic_bytes=8)
        software = replace(software, reduce_bytes=2 if "PURE" in sharding else 4)
        if "PURE" in sharding:
            software = replace(software, weight_bytes=2, gradient_bytes=2, optimizer_bytes=4, weight_copy_bytes=0)
    elif "torchtitan" in framework:
        software = _torchtitan(row)
    elif "ZeRO-3" in framework:
        software = replace(_megatron(row), name="DeepSpeed")
    elif "OneFlow" in framework:
        software = replace(_megatron(row), name="OneFlow", overlaps_data_parallel=True)
    elif "MoAI" in framework:
        software = SoftwareProfile("MoAI Platform")
    elif re.search(r"megatron|nemo|neox", name) or name == "deepspeed":
        software = replace(_megatron(row), guessed=not re.match(r"megatron", name))
    elif re.search(r"transformers|hugging|\btrl\b|axolotl|llama.?factory|accelerate|torchtune|lightning", name):
        # Eager kernels of transformers: a norm in float32 moves 32 bytes for each of its numbers, a fused one 4, and
        # rotary embeddings move twice as much. For a Llama's widths that is twice the traffic of fused kernels.
        software = SoftwareProfile(framework, guessed=True, layer_kernels=32, elementwise_traffic=2.0, logit_bytes=12)
    else:
        software = SoftwareProfile(framework or "unknown", guessed=True)
    if software.guessed and fsdp:
        # Without a setting, FSDP reduces gradients in the precision of computation. With stages, weights stay gathered.
        software = replace(software, reduce_bytes=2, reshards_in_pipeline=False)
    if "deepspeed" in name and zero_3:
        # Before version 0.6, the streams of computation and communication waited for each other
        # (https://arxiv.org/abs/2205.00119, section 4).
        overlaps = publication_year(row) > LAST_YEAR_OF_WAITING_STREAMS
        software = replace(software, exchanges_each_matrix=True, overlaps_data_parallel=overlaps)
    return replace(software, compute=compute)


def publication_year(row: RunRow) -> float:
    """The year in which a run was published, by a year, an arXiv number or a conference in its cells; else infinity."""
    text = " ".join(cell(row, column) for column in ("framework", "group", "source"))
    years = [int(year) for year in re.findall(r"(?<![\d.:@/])(20[12]\d)(?!\d)", text)]
    years += [2000 + int(year) for year in re.findall(r"arxiv[:\s]?\s?(\d\d)\d\d\.\d{4,5}", text.lower())]
    years += [2000 + int(year) for year in re.findall(r"\b(?:SC|NeurIPS|ICML|MLSys|ISCA|MICRO)[' -]?(\d\d)\b", text)]
    return min(years, default=math.inf)


def trains_with_dropout(row: RunRow) -> bool:
    """True if a GPT has dropout: early Megatron and the programs compared with it use dropout."""
    name = cell(row, "framework").lower()
    return re.search(r"megatron|deepspeed|oneflow|moai", name) is not None and not is_modern_megatron(row)


def is_modern_megatron(row: RunRow) -> bool:
    """True if a row is of Megatron Core, or of Megatron-LM on devices that are as new."""
    name = cell(row, "framework").lower()
    if re.search(r"megatron|nemo", name) is None:
        return False
    words = f"{name} {cell(row, 'group')}".lower()
    new_name = re.search(r"core|bridge|nemo|transformer.?engine|nightly|\b202[3-9]\b", words) is not None
    return new_name or re.search(r"[hb][1-3]00|h20|mi3", cell(row, "gpu").lower()) is not None


def _megatron(row: RunRow) -> SoftwareProfile:
    """Megatron-LM as in arXiv:2205.05198, or Megatron Core as it is on newer devices."""
    # Float16 weights and a master copy; fused softmax, bias and dropout.
    software = SoftwareProfile(
        "Megatron",
        weight_bytes=2,
        weight_copy_bytes=0,
        gradient_bytes=4,
        optimizer_bytes=12,
        reduce_bytes=2,
        fused_attention=False,
        fuses_dropout=True,
        logit_traffic_bytes=20,
        overlaps_data_parallel=False,
    )
    if not is_modern_megatron(row):
        return software
    # With FlashAttention and a fused cross-entropy.
    software = replace(software, name="Megatron Core", fused_attention=True, logit_bytes=6, logit_traffic_bytes=12)
    if not re.search(r"bridge|nemo", cell(row, "framework").lower()):
        return replace(software, reduce_bytes=4)
    # NeMo's recipes reduce gradients in half precision, and overlap both kinds of exchange with computation. Megatron's
    # own scripts do so only when asked to.
    return replace(software, gradient_bytes=2, overlaps_data_parallel=True, overlaps_tensor_parallel=True)


def _torchtitan(row: RunRow) -> SoftwareProfile:
    """torchtitan, arXiv:2410.06511. Its selective recomputation repeats every second matmul."""
    framework = cell(row, "framework")
    software = SoftwareProfile(
        "torchtitan",
        recomputed_matmuls=0.5,
        overlaps_tensor_parallel="async" in framework.lower(),
        reshards_in_pipeline=False,
        gated_copies=1.0,
        # The loss holds log-probabilities, their gradient and that of the logits in float32.
        logit_bytes=12,
    )
    if "compile" in framework:
        # Since 2025 it compiles the loss too, which then converts logits as it reads them.
        logit_bytes = 6 if re.search(r"202[5-9]", cell(row, "group")) else 10
        return replace(software, elementwise_traffic=0.7, gated_copies=0.5, logit_bytes=logit_bytes)
    return software
