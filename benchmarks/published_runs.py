"""Published measurements of training runs, read as what the planner works on: a model, a plan, a cluster, a program.

The format is that of data/published_runs.csv, a row for each measurement. What a row does not say and the program's
documentation does (which kernels, what is kept in memory) is in published_programs.py; what neither says makes the row
unusable, with the reason.
"""

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from published_programs import Row, implementation_of

from moreh.accelerator.devices import Device, find_device
from moreh.errors import PlanError
from moreh.planner.architecture import Architecture, DecoderLayer, Linear
from moreh.planner.cluster import Cluster, cluster_of_devices
from moreh.planner.implementation import Implementation
from moreh.planner.plan import Plan, Recomputation, Schedule, Sharding, Training
from moreh.planner.schedules import check_schedule

_NETWORKS = Path(__file__).parent / "data" / "networks.csv"
_DEVICES = (  # in the order in which the patterns are tried
    (r"mi250x", "MI250X GCD"),
    (r"mi250", "MI250 GCD"),
    (r"mi210", "MI210"),
    (r"mi300x", "MI300X"),
    (r"a100.*40", "A100 40GB"),
    (r"a100", "A100 80GB"),
    (r"h100.*96", "H100 96GB"),
    (r"h100", "H100 80GB"),
    (r"h200", "H200"),
    (r"b200", "B200"),
    (r"v100.*32", "V100 32GB"),
    (r"v100", "V100 16GB"),
)


class Unusable(Exception):
    """A row lacks what a prediction needs, or describes what is not modelled."""


@dataclass(frozen=True)
class PublishedRun:
    """A row that can be predicted. `units` is the number of devices as the row counts them (a package may hold two)."""

    id: str
    group: str
    sweep: str
    training: Training
    plans: tuple[Plan, ...]
    cluster: Cluster
    implementation: Implementation
    units: int
    step_time_s: float | None
    memory_gib: float | None
    out_of_memory: bool


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of published runs."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def published_run(row: Row) -> PublishedRun:
    """A row as a model, a plan and a cluster. Where it leaves the micro-batch size open, there are several plans.

    Raises:
        Unusable: the row lacks what a prediction needs.
    """
    architecture = _architecture(row)
    device, per_unit = _device(row)
    units = _required(row, "n_gpus")
    devices = units * per_unit
    tensor, pipeline = _optional(row, "tp"), _optional(row, "pp")
    if tensor is None or pipeline is None:
        raise Unusable("the plan is not given (tp, pp)")
    if (_optional(row, "ep") or 1) > 1:
        raise Unusable("expert parallelism is not modelled")
    context = _optional(row, "cp") or 1
    data = devices // (tensor * pipeline * context)
    if tensor * pipeline * context * data != devices:
        raise Unusable(f"tp x pp x cp = {tensor * pipeline * context} does not divide {devices} devices")
    network = _network(row)
    cluster = cluster_of_devices(device, devices, network)
    length = _optional(row, "seq_len")
    if length is None:
        if "torchtitan" not in row["framework"]:
            raise Unusable("seq_len is not given")
        length = 8192  # of torchtitan's llama3_8b.toml
    batch = _optional(row, "gbs")
    sizes = _micro_batch_sizes(row, batch, data)
    if batch is None:
        batch = sizes[0] * data * (_optional(row, "grad_accum") or 1)
    if (_optional(row, "layers") or 0) < pipeline:
        raise Unusable(f"fewer layers than stages ({row['layers']} < {pipeline})")
    training = Training(architecture, batch, length)
    implementation = implementation_of(row)
    if "torchtitan" in row["framework"] and pipeline > 1:
        sizes = (_torchtitan_micro_batch_size(row, sizes[0], pipeline),)
    plans = tuple(_plan(row, architecture, tensor, pipeline, data, context, size, batch // (data * size)) for size in sizes)
    measured = _step_time_s(row, training, units)
    memory = _number(row, "peak_mem_gib_per_gpu")
    text = " ".join(value for key, value in row.items() if key in ("flag", "notes", "mem_as_published") and value).lower()
    sweep = "/".join((row["group"], row["framework"], row["model"], row["gpu"], str(units), str(batch), str(length)))
    return PublishedRun(
        id=row["id"],
        group=row["group"],
        sweep=f"{sweep}/{row['precision']}",
        training=training,
        plans=plans,
        cluster=cluster,
        implementation=implementation,
        units=units,
        step_time_s=measured,
        memory_gib=memory,
        out_of_memory=measured is None and re.search(r"\boom\b|out.of.memory", text) is not None,
    )


def _number(row: Row, column: str) -> float | None:
    text = (row.get(column) or "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise Unusable(f"{column}={text!r} is no number") from None
    return value if math.isfinite(value) else None


def _optional(row: Row, column: str) -> int | None:
    value = _number(row, column)
    return None if value is None else round(value)


def _required(row: Row, column: str) -> int:
    value = _optional(row, column)
    if value is None or value < 1:
        raise Unusable(f"{column} is not given")
    return value


def _device(row: Row) -> tuple[Device, int]:
    """The kind of device, and how many of them a unit of the row's counts holds."""
    name = row["gpu"].lower()
    for pattern, device in _DEVICES:
        if re.search(pattern, name):
            return find_device(device), 2 if "package" in name else 1
    raise Unusable(f"no data of device {row['gpu']!r}")


def _network(row: Row) -> float | None:
    """Bytes/s of a device towards other nodes, of the system that was measured; None where nothing is known of it."""
    with _NETWORKS.open(encoding="utf-8", newline="") as file:
        for entry in csv.DictReader(file):
            if entry["group"] == row["group"] and entry["gpu"] in ("", row["gpu"]):
                return float(entry["network_gbit_per_s_per_device"]) * 1e9 / 8
    return None


def _architecture(row: Row) -> Architecture:
    """A GPT, or a Llama where the name says so: the two shapes that all published rows have."""
    layers, hidden = _required(row, "layers"), _required(row, "hidden")
    name = row["model"]
    llama = re.search(r"llama|mistral|qwen|baichuan", name.lower()) is not None
    bare = re.search(r"mpt", name.lower()) is not None  # no biases, positions by ALiBi or a small table
    heads = _optional(row, "heads") or max(1, hidden // 128)
    kv_heads = _optional(row, "kv_heads") or heads
    inner = _optional(row, "ffn") or 4 * hidden
    vocabulary = _optional(row, "vocab") or 51200  # GPT-2's, padded to a multiple of 1,024 as Megatron does
    size, bias = hidden // heads, not (llama or bare)
    keys = kv_heads * size
    linears = [
        Linear("query", hidden, hidden, "column", bias),
        Linear("key", hidden, keys, "column", bias),
        Linear("value", hidden, keys, "column", bias),
        Linear("output", hidden, hidden, "row", bias),
        Linear("up", hidden, inner, "column", bias),
        Linear("down", inner, hidden, "row", bias),
    ]
    if llama:
        linears.append(Linear("gate", hidden, inner, "column"))
    norm = hidden * (2 if bias else 1)
    layer = DecoderLayer(heads, kv_heads, size, tuple(linears), 2 * norm, 4 if bias else 2)
    positions = 0 if llama else (_optional(row, "seq_len") or 0) * hidden
    return Architecture(
        name=name,
        family="llama" if llama else "gpt2",
        hidden=hidden,
        vocabulary=vocabulary,
        layers=(layer,) * layers,
        tied=not llama,
        gated=llama,
        norm="rms" if llama else "layer",
        rotary=llama,
        dropout=bias,
        table_parameters=positions,
        table_tensors=1 if positions else 0,
        final_parameters=norm,
        final_tensors=2 if bias else 1,
    )


def _micro_batch_sizes(row: Row, batch: int | None, data: int) -> tuple[int, ...]:
    size = _optional(row, "mbs")
    if size is not None:
        if batch is not None and batch % (data * size):
            raise Unusable(f"gbs {batch} is no multiple of dp x mbs = {data * size}")
        return (size,)
    if batch is None or batch % data:
        raise Unusable("neither mbs nor a gbs that dp divides is given")
    return tuple(2**k for k in range(6) if batch // data % 2**k == 0)


def _torchtitan_micro_batch_size(row: Row, local_batch: int, pipeline: int) -> int:
    """Rows of a micro-batch of torchtitan, whose rows give the batch of a rank: once one for each stage, later one of a row."""
    stages = pipeline * (_optional(row, "vpp") or 1)
    if "2025" in row["group"] or local_batch % stages:
        return 1
    return local_batch // stages


def _plan(
    row: Row,
    architecture: Architecture,
    tensor: int,
    pipeline: int,
    data: int,
    context: int,
    micro_batch_size: int,
    micro_batches: int,
) -> Plan:
    chunks = _optional(row, "vpp") or 1
    stages = pipeline * chunks
    layers = len(architecture.layers)
    if chunks > 1 and layers < stages:
        raise Unusable(f"fewer layers than stages ({layers} < {stages})")
    schedule: Schedule = "interleaved" if chunks > 1 else "1f1b"
    if schedule == "interleaved":
        try:
            check_schedule(schedule, pipeline, micro_batches, chunks)
        except PlanError as error:
            raise Unusable(str(error)) from None
    recompute = row["recompute"].lower()
    if not recompute and "torchtitan" in row["framework"]:
        recompute = "selective"  # of torchtitan's configurations
    recomputation: Recomputation = (
        "full" if recompute.startswith("full") else "selective" if recompute.startswith("selective") else "none"
    )
    sequence_parallel = tensor > 1 and (
        "sequence" in recompute or "torchtitan" in row["framework"] or "SimuMax" in row["framework"]
    )
    return Plan(
        stage_layers=tuple(layers * (s + 1) // stages - layers * s // stages for s in range(stages)),
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        context=context,
        micro_batch_size=micro_batch_size,
        micro_batches=micro_batches,
        schedule=schedule,
        chunks=chunks,
        recomputation=recomputation,
        sharding=_sharding(row),
        sequence_parallel=sequence_parallel,
    )


def _sharding(row: Row) -> Sharding:
    text = row["sharding"]
    if re.search(r"FULL_SHARD|FSDP|ZeRO-3|distribute_param", text):
        return "parameters"
    if re.search(r"SHARD_GRAD_OP|ZeRO-2", text):
        return "gradients"
    # DeepSpeed's optimizer for bfloat16 divides its state over the ranks at every ZeRO level.
    bfloat16 = "DeepSpeed" in row["framework"] and row["precision"] == "bf16"
    return "optimizer" if "ZeRO-1" in text or bfloat16 else "none"


def _step_time_s(row: Row, training: Training, units: int) -> float | None:
    """Seconds of a step, from whichever of the published figures there is."""
    step = _number(row, "step_time_s")
    if step is not None:
        return step
    for column, per_second in (("tok_s_per_gpu", units), ("tok_s_total", 1)):
        rate = _number(row, column)
        if rate:
            return training.tokens / (rate * per_second)
    samples = _number(row, "samples_s_total")
    if samples:
        return training.global_batch_size / samples
    tflops = _number(row, "tflops_per_gpu")
    if tflops and ("96BsLh" in row["tflops_counts"] or "incl. full recompute" in row["tflops_counts"]):
        # Equation 3 of arXiv:2104.04473
        model = training.architecture
        hidden, layers = model.hidden, len(model.layers)
        terms = 1 + training.sequence_length / (6 * hidden) + model.vocabulary / (16 * layers * hidden)
        return 96 * training.tokens * layers * hidden**2 * terms / (tflops * 1e12 * units)
    return None


def usable_runs(rows: list[Row]) -> Iterator[tuple[Row, PublishedRun | None, str]]:
    """Every row with what it means, or with the reason why it cannot be predicted."""
    for row in rows:
        try:
            yield row, published_run(row), ""
        except Unusable as reason:
            yield row, None, str(reason)
