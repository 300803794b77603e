"""Enumerates the candidate plans, in tables."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moreh.errors import PlanError
from moreh.planner.cost.layer_time import embedding_time, head_time, layer_time
from moreh.planner.cost.stage_parameters import reshards_each_micro_batch
from moreh.planner.hardware.cluster import Cluster
from moreh.planner.hardware.roofline import Roofline
from moreh.planner.plan.arrays import FloatArray, IntArray
from moreh.planner.plan.expert_groups import expert_divisor
from moreh.planner.plan.layer_balancing import even_layers, layers_balanced_by_rank, layers_balanced_by_stage
from moreh.planner.plan.plan import Schedule, Training
from moreh.planner.plan.plan_table import (
    RECOMPUTE_FULL,
    RECOMPUTE_NONE,
    RECOMPUTE_SELECTIVE,
    SHARD_GRADIENTS,
    SHARD_NONE,
    SHARD_PARAMETERS,
    PlanTable,
)
from moreh.planner.plan.schedules import SPLIT_BACKWARD, is_runnable
from moreh.planner.search.constraints import Constraints
from moreh.planner.software_profile import SoftwareProfile

# More chunks on a rank than this give little less bubble and many more messages.
MAX_CHUNKS = 8


class _Columns(NamedTuple):
    """The columns of a `PlanTable` that do not depend on the schedule, [n] each."""

    tensor: IntArray
    context: IntArray
    expert: IntArray
    data: IntArray
    micro_batch_size: IntArray
    micro_batches: IntArray
    recomputation: IntArray
    sharding: IntArray
    sequence_parallel: IntArray  # 0 or 1

    def take(self, rows: NDArray[Any]) -> "_Columns":
        """The rows at these indices, or where this mask is true."""
        return _Columns(*(column[rows] for column in self))

    def table(self, pipeline: int, schedule: Schedule, chunks: int, stage_layers: IntArray) -> PlanTable:
        """A table of these columns with a pipeline."""
        columns = self._asdict() | {"sequence_parallel": self.sequence_parallel.astype(np.bool_)}
        # The runtime has no hybrid sharding.
        columns["replicas"] = np.ones_like(self.tensor)
        return PlanTable(pipeline=pipeline, chunks=chunks, schedule=schedule, stage_layers=stage_layers, **columns)


def candidate_tables(
    roofline: Roofline, cluster: Cluster, training: Training, constraints: Constraints
) -> Iterator[PlanTable]:
    """Every plan on all devices of the cluster that satisfies the constraints, in a table for each kind of pipeline.

    Raises:
        PlanError: the batch cannot be split over the devices, or nothing satisfies the constraints.
    """
    if training.global_batch_size < 1 or training.sequence_length < 1:
        raise PlanError(
            f"batch of {training.global_batch_size} x {training.sequence_length} tokens: both numbers must be at least "
            "1"
        )
    has_plans = False
    for pipeline in _pipeline_sizes(cluster, training, constraints):
        grids = list(_column_grids(cluster, training, constraints, pipeline))
        if not grids:
            continue
        columns = _Columns(*(np.concatenate(parts) for parts in zip(*grids, strict=True)))
        edges = _edge_work(roofline, cluster, training, pipeline, columns)
        for schedule, chunks in _schedules(pipeline, training, constraints):
            table = _table(roofline.software, training, pipeline, schedule, chunks, columns, edges)
            if len(table):
                has_plans = True
                yield table
    if not has_plans:
        batch = f"{training.global_batch_size} x {training.sequence_length}"
        unrestricted = Constraints(
            max_context=constraints.max_context,
            max_expert=constraints.max_expert,
            memory_fraction=constraints.memory_fraction,
        )
        if constraints == unrestricted:
            remedy = f"give a batch that has more divisors in common with {cluster.devices}"
        else:
            remedy = f"give fewer restrictions, or a batch that has more divisors in common with {cluster.devices}"
        if not training.optimizer.works_on_shards:
            remedy = f"{training.optimizer.name} needs whole matrices: choose another optimizer, or {remedy}"
        raise PlanError(f"no plan divides a batch of {batch} over {_devices_text(cluster)} as asked: {remedy}")


def _devices_text(cluster: Cluster) -> str:
    return f"{cluster.devices} device{'s' if cluster.devices > 1 else ''}"


def divisors(number: int) -> list[int]:
    """All divisors of a number, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _pipeline_sizes(cluster: Cluster, training: Training, constraints: Constraints) -> list[int]:
    layers = len(training.architecture.layers)
    sizes = [size for size in divisors(cluster.devices) if size <= layers]
    if constraints.pipeline is not None:
        sizes = [size for size in sizes if size == constraints.pipeline]
        if not sizes:
            raise PlanError(
                f"{constraints.pipeline} stages: the number must divide {_devices_text(cluster)} and be at most the "
                f"model's {layers} layers"
            )
    return sizes


def _column_grids(cluster: Cluster, training: Training, constraints: Constraints, pipeline: int) -> Iterator[_Columns]:
    """All combinations of the other choices with a pipeline size, a grid for each tensor- and context-parallel size."""
    architecture = training.architecture
    heads = int(np.gcd.reduce([head for layer in architecture.layers for head in (layer.heads, layer.kv_heads)]))
    devices_per_stage = cluster.devices // pipeline
    for tensor in divisors(int(np.gcd(heads, devices_per_stage))):
        if constraints.max_tensor is not None and tensor > constraints.max_tensor:
            continue
        for context in divisors(devices_per_stage // tensor):
            # Each rank gets a part of the sequence's beginning and one of its end, so that the causal mask leaves all
            # ranks equal work.
            if context > constraints.max_context or (context > 1 and training.sequence_length % (2 * context)):
                continue
            data = devices_per_stage // tensor // context
            if training.global_batch_size % data:
                continue
            sequences = training.global_batch_size // data
            counts = np.array(divisors(sequences))
            if constraints.micro_batches is not None:
                counts = counts[counts == constraints.micro_batches]
            elif constraints.max_micro_batch_tokens is not None and pipeline == 1:
                most = max(1, constraints.max_micro_batch_tokens // training.sequence_length)
                counts = counts[sequences // counts <= most]
            grid = np.meshgrid(
                counts,
                _expert_sizes(data, training, constraints),
                _recomputations(constraints),
                _shardings(data * context, constraints),
                _sequence_parallel(tensor, training, constraints),
                indexing="ij",
            )
            micro_batches, expert, recomputation, sharding, sequence_parallel = (axis.reshape(-1) for axis in grid)
            yield _Columns(
                tensor=np.full_like(micro_batches, tensor),
                context=np.full_like(micro_batches, context),
                expert=expert,
                data=np.full_like(micro_batches, data),
                micro_batch_size=sequences // micro_batches,
                micro_batches=micro_batches,
                recomputation=recomputation,
                sharding=sharding,
                sequence_parallel=sequence_parallel,
            )


def _expert_sizes(data: int, training: Training, constraints: Constraints) -> list[int]:
    """The numbers of data-parallel ranks that can hold the experts of a mixture together."""
    largest_group = int(np.gcd(data, expert_divisor(training.architecture)))
    return [size for size in divisors(largest_group) if size <= constraints.max_expert]


def _recomputations(constraints: Constraints) -> list[int]:
    if constraints.recompute is None:
        return [RECOMPUTE_NONE, RECOMPUTE_SELECTIVE, RECOMPUTE_FULL]
    return [RECOMPUTE_SELECTIVE, RECOMPUTE_FULL] if constraints.recompute else [RECOMPUTE_NONE]


def _shardings(ranks: int, constraints: Constraints) -> list[int]:
    """The codes of shardings over a number of data- and context-parallel ranks."""
    if constraints.shard_parameters is True:
        return [SHARD_PARAMETERS] if ranks > 1 else []
    codes = list(range(SHARD_PARAMETERS + 1)) if ranks > 1 else [SHARD_NONE]
    return [code for code in codes if code != SHARD_PARAMETERS] if constraints.shard_parameters is False else codes


def _sequence_parallel(tensor: int, training: Training, constraints: Constraints) -> list[int]:
    choices = [0, 1] if tensor > 1 and training.sequence_length % tensor == 0 else [0]
    if constraints.sequence_parallel is None:
        return choices
    return [choice for choice in choices if choice == int(constraints.sequence_parallel)]


def _schedules(pipeline: int, training: Training, constraints: Constraints) -> Iterator[tuple[Schedule, int]]:
    """Schedules with their chunks, the simpler ones first."""
    if pipeline == 1:
        yield "1f1b", 1
        return
    max_chunks = min(MAX_CHUNKS, len(training.architecture.layers) // pipeline)
    for schedule in constraints.schedules:
        if schedule == "1f1b":
            yield schedule, 1
        elif schedule == "zbv" and max_chunks >= 2:
            yield schedule, 2
        elif schedule == "interleaved":
            yield from (("interleaved", chunks) for chunks in range(2, max_chunks + 1))
        elif schedule == "zero-bubble":
            yield from (("zero-bubble", chunks) for chunks in range(1, max_chunks + 1))


def _table(
    software: SoftwareProfile,
    training: Training,
    pipeline: int,
    schedule: Schedule,
    chunks: int,
    columns: _Columns,
    edges: tuple[FloatArray, FloatArray],
) -> PlanTable:
    """The plans that the schedule can run, with even stages and, where these differ, with balanced ones.

    Args:
        edges: What the first and the last stage compute besides their layers, as from `_edge_work`.
    """
    allowed = is_runnable(schedule, np.asarray(pipeline), columns.micro_batches, np.asarray(chunks))
    if schedule in SPLIT_BACKWARD:
        # A split backward pass leaves gradients of sharded parameters wrong, without an error, and recomputes
        # activations again for the gradient of every single matrix.
        allowed = allowed & (columns.sharding == SHARD_NONE) & (columns.recomputation == RECOMPUTE_NONE)
    if not reshards_each_micro_batch(pipeline, software):
        # Gradients are whole until the end of the step, so sharding them is the same as sharding the optimizer.
        allowed = allowed & (columns.sharding != SHARD_GRADIENTS)
    if not training.optimizer.works_on_shards:
        allowed = allowed & (columns.tensor == 1) & (columns.expert == 1) & (columns.sharding == SHARD_NONE)
    columns = columns.take(allowed)
    stages = pipeline * chunks
    layers = len(training.architecture.layers)
    even = np.tile(np.array(even_layers(layers, stages), dtype=np.int64), (len(columns.tensor), 1))
    table = columns.table(pipeline, schedule, chunks, even)
    if stages == 1 or not len(table):
        return table
    variants = [even]
    variant_rows = [np.arange(len(table))]
    for balanced in _balanced_layers(table, layers, edges[0][allowed], edges[1][allowed]):
        differs = [np.any(balanced != other, axis=1) for other in _for_all_rows(variants, variant_rows)]
        new_rows = np.flatnonzero(np.all(differs, axis=0))
        variants.append(balanced[new_rows])
        variant_rows.append(new_rows)
    return columns.take(np.concatenate(variant_rows)).table(pipeline, schedule, chunks, np.concatenate(variants))


def _for_all_rows(variants: list[IntArray], variant_rows: list[IntArray]) -> list[IntArray]:
    """Each variant of the stages' layers for all rows, with even layers in the rows that the variant does not have."""
    result = []
    for variant, rows in zip(variants, variant_rows, strict=True):
        stage_layers = variants[0].copy()
        stage_layers[rows] = variant
        result.append(stage_layers)
    return result


def _edge_work(
    roofline: Roofline, cluster: Cluster, training: Training, pipeline: int, columns: _Columns
) -> tuple[FloatArray, FloatArray]:
    """The time of the first and last stage besides their layers, in units of a layer's time, [n] each.

    Links and sharding do not enter, so that a faster link cannot change how layers are spread over stages.
    """
    device = cluster.device
    unlimited = replace(
        device, node_bytes_per_second=np.inf, network_bytes_per_second=np.inf, package_bytes_per_second=None
    )
    cluster = replace(cluster, device=unlimited)
    roofline = replace(roofline, efficiency=replace(roofline.efficiency, node_hop_s=0.0, network_hop_s=0.0))
    one_layer_each = np.ones((len(columns.tensor), pipeline), dtype=np.int64)
    table = columns.table(pipeline, "1f1b", 1, one_layer_each)
    layer = layer_time(roofline, cluster, table, training)
    layer_s = layer.forward_s + layer.backward_s + layer.recompute_s
    embedding, head = embedding_time(roofline, cluster, table, training), head_time(roofline, cluster, table, training)
    return (embedding.forward_s + embedding.backward_s) / layer_s, (head.forward_s + head.backward_s) / layer_s


def _balanced_layers(table: PlanTable, layers: int, first: FloatArray, last: FloatArray) -> list[IntArray]:
    """Layers for stages of equal work, and for ranks of equal work if these hold several stages, [n, stages] each."""
    by_stage = layers_balanced_by_stage(layers, table.stages, first, last)
    if table.chunks == 1:
        return [by_stage]
    folded = table.schedule == "zbv"
    return [by_stage, layers_balanced_by_rank(layers, table.pipeline, table.chunks, first, last, folded=folded)]
