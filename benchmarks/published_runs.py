"""Published measurements of training runs as the planner's inputs: a model, a plan, a cluster, a program.

The format is that of data/published_runs.csv, a row for each measurement. What only the program's documentation says
(which kernels, what is kept in memory) is in published_programs.py. A row that leaves open what is needed for a
prediction is unusable, and the reason is reported.
"""

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from accuracy.clusters import device_of, network_bytes_per_second
from accuracy.columns import parallel_sizes, with_known_columns, with_known_model
from accuracy.measured_memory import MemoryKind, memory_kind
from accuracy.modeled import check_modeled, compute_of
from accuracy.step_times import step_time_s
from accuracy.words import not_modeled, recomputation_of, sharding_of, sharding_replicas, uses_sequence_parallelism
from published_models import architecture_of
from published_programs import RunRow, Unusable, cell, measurement, optional, program_of, required, software_of

from moreh.errors import PlanError
from moreh.models.architecture import Architecture
from moreh.planner.hardware.cluster import Cluster, cluster_for_devices
from moreh.planner.plan.plan import Plan, Schedule, Training
from moreh.planner.plan.schedules import check_schedule
from moreh.planner.software_profile import SoftwareProfile

# Passes of a micro-batch through a stage. This is several times the largest published run, and takes a second to
# simulate.
MAX_PASSES = 2**20


@dataclass(frozen=True)
class PublishedRun:
    """A row that can be predicted."""

    id: str
    digest: str
    """A hash of the row without its id."""
    group: str
    """The publication or the system."""
    program: str
    """The program, without its version."""
    sweep: str
    """The fields that identify runs which differ only in the plan."""
    training: Training
    plans: tuple[Plan, ...]
    """Several if the row leaves the micro-batch size open."""
    cluster: Cluster
    software: SoftwareProfile
    units: int
    """Devices as the row counts them: a unit may be a package of two."""
    step_time_s: float | None
    """The measured seconds of a step; None if the row does not give them."""
    memory_gib: float | None
    """The measured peak of a device; None if the row does not give it."""
    memory_kind: MemoryKind
    """The kind of memory."""
    out_of_memory: bool
    """True if the run ran out of memory."""


def read_rows(path: Path) -> list[RunRow]:
    """The rows of a file of published runs. Bytes that are not UTF-8 are replaced; cells that are cut off are empty."""
    csv.field_size_limit(2**31 - 1)  # a quote that is never closed makes one cell of the rest of the file
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        lines = (line.replace("\0", "") for line in file)  # the csv module of Python 3.10 refuses NUL
        rows = csv.DictReader(lines, restkey="", restval="")
        return [{column: text for column, text in row.items() if column} for row in rows]


def row_digest(row: RunRow) -> str:
    """Twelve hexadecimal digits of a hash of a row without its id: another file may give the id to another row."""
    cells = sorted((column, cell(row, column)) for column in row if column != "id" and cell(row, column))
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()[:12]


def published_run(row: RunRow) -> PublishedRun:
    """A row as a model, a plan and a cluster. If it leaves the micro-batch size open, there are several plans.

    Raises:
        Unusable: the row does not give what a prediction needs.
    """
    digest, row = row_digest(row), with_known_model(with_known_columns(row))
    architecture, framework = architecture_of(row), cell(row, "framework")
    device, per_unit = device_of(row)
    units = required(row, "n_gpus")
    devices = units * per_unit
    tensor, pipeline, context = parallel_sizes(row, devices)
    check_modeled(row)
    data = devices // (tensor * pipeline * context)
    if tensor * pipeline * context * data != devices:
        raise Unusable(f"tp x pp x cp = {tensor * pipeline * context} does not divide {devices} devices")
    given_data = optional(row, "dp")
    if given_data is not None and tensor * pipeline * context * given_data not in (units, devices):
        raise Unusable(f"dp={given_data} contradicts {devices} devices / (tp x pp x cp) = {data}")
    cluster = cluster_for_devices(device, devices, network_bytes_per_second(row, device))
    length = optional(row, "seq_len")
    if length is None:
        if "torchtitan" not in framework:
            raise Unusable("seq_len is not given")
        length = 8192  # that of torchtitan's llama3_8b.toml
    batch = optional(row, "gbs")
    sizes = _micro_batch_sizes(row, batch, data)
    if batch is None:
        batch = sizes[0] * data * (optional(row, "grad_accum") or 1)
    if len(architecture.layers) < pipeline:
        raise Unusable(f"fewer layers than stages ({len(architecture.layers)} < {pipeline})")
    training = Training(architecture, batch, length)
    software = replace(software_of(row, compute_of(row)), not_modeled=not_modeled(row, length))
    if "torchtitan" in framework and pipeline > 1:
        sizes = (_torchtitan_micro_batch_size(row, sizes[0], pipeline),)
    node_ranks = max(1, cluster.devices_per_node // tensor)
    plans = tuple(
        _plan(row, architecture, tensor, pipeline, data, context, size, batch // (data * size), node_ranks)
        for size in sizes
    )
    measured = step_time_s(row, training, units, per_unit * device.bf16_flops_per_second)
    text = " ".join(cell(row, column) for column in ("flag", "mem_as_published", "notes")).lower()
    names = [cell(row, column) for column in ("group", "framework", "model", "gpu")]
    return PublishedRun(
        id=cell(row, "id"),
        digest=digest,
        group=cell(row, "group"),
        program=program_of(row),
        sweep="/".join((*names, str(units), str(batch), str(length), cell(row, "precision"))),
        training=training,
        plans=plans,
        cluster=cluster,
        software=software,
        units=units,
        step_time_s=measured,
        memory_gib=measurement(row, "peak_mem_gib_per_gpu"),
        memory_kind=memory_kind(row),
        out_of_memory=measured is None and re.search(r"\boom\b|out.of.memory", text) is not None,
    )


def _micro_batch_sizes(row: RunRow, batch: int | None, data: int) -> tuple[int, ...]:
    """The micro-batch size of the row, or all powers of two up to 32 that are possible if it gives none."""
    size = optional(row, "mbs")
    if size is not None:
        if batch is not None and batch % (data * size):
            raise Unusable(f"gbs {batch} is not a multiple of dp x mbs = {data * size}")
        return (size,)
    if batch is None or batch % data:
        raise Unusable("neither mbs nor a gbs that dp divides is given")
    return tuple(2**k for k in range(6) if batch // data % 2**k == 0)


def _torchtitan_micro_batch_size(row: RunRow, local_batch: int, pipeline: int) -> int:
    """Sequences of a micro-batch of torchtitan, of which rows give the batch of a rank.

    Its default was one micro-batch for each stage, and later micro-batches of one sequence. This is from memory: no
    published row at hand has a pipeline to check it with.
    """
    stages = pipeline * (optional(row, "vpp") or 1)
    if "2025" in cell(row, "group") or local_batch % stages:
        return 1
    return local_batch // stages


def _plan(
    row: RunRow,
    architecture: Architecture,
    tensor: int,
    pipeline: int,
    data: int,
    context: int,
    micro_batch_size: int,
    micro_batches: int,
    node_ranks: int,
) -> Plan:
    chunks = optional(row, "vpp") or 1
    stages = pipeline * chunks
    layers = len(architecture.layers)
    if stages * micro_batches > MAX_PASSES:
        raise Unusable(f"{micro_batches} micro-batches through {stages} stages are too many to simulate")
    if chunks > 1 and layers < stages:
        raise Unusable(f"fewer layers than stages ({layers} < {stages})")
    schedule: Schedule = "interleaved" if chunks > 1 else "1f1b"
    if schedule == "interleaved":
        try:
            check_schedule(schedule, pipeline, micro_batches, chunks)
        except PlanError as error:
            raise Unusable(str(error)) from None
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
        # Unknown words: the interval is wide then.
        recomputation=recomputation_of(row) or "none",
        sharding=sharding_of(row) or "none",
        replicas=sharding_replicas(row, data * context, node_ranks) if sharding_of(row) not in (None, "none") else 1,
        sequence_parallel=tensor > 1 and uses_sequence_parallelism(row),
    )


def failure(error: Exception) -> str:
    """The error, in one line."""
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, Unusable) else f"{type(error).__name__}: {text}"


def usable_runs(rows: list[RunRow]) -> Iterator[tuple[RunRow, PublishedRun | None, str]]:
    """Every row with its run, or with the reason why it cannot be predicted."""
    for row in rows:
        run, reason = None, ""
        try:
            run = published_run(row)
        except Exception as error:  # one row never stops the others
            reason = failure(error)
        yield row, run, reason
