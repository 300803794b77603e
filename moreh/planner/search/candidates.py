"""All plans that could be run: the tables that the search goes through."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from moreh.errors import PlanError
from moreh.planner.cost.layer_time import embedding_time, head_time, layer_time
from moreh.planner.cost.stage_time import reshards_each_micro_batch
from moreh.planner.hardware.cluster import Cluster
from moreh.planner.hardware.roofline import Roofline
from moreh.planner.plan.arrays import BoolArray, FloatArray, IntArray
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


def candidate_tables(
    roofline: Roofline, cluster: Cluster, training: Training, constraints: Constraints
) -> Iterator[PlanTable]:
    """Every plan on all devices of the cluster, in tables of plans with the same pipeline.

    Raises:
        PlanError: the batch cannot be divided, or nothing satisfies the constraints.
    """
    if training.global_batch_size < 1 or training.sequence_length < 1:
        raise PlanError(
            f"batch of {training.global_batch_size} x {training.sequence_length} tokens: both numbers must be at least 1"
        )
    found = False
    for pipeline in _pipelines(cluster, training, constraints):
        groups = list(_groups(cluster, training, constraints, pipeline))
        if not groups:
            continue
        columns = [np.concatenate([group[i] for group in groups]) for i in range(len(groups[0]))]
        ends = _work_of_ends(roofline, cluster, training, pipeline, columns)
        for schedule, chunks in _schedules(pipeline, training, constraints):
            table = _table(roofline.software, training, pipeline, schedule, chunks, columns, ends)
            if len(table):
                found = True
                yield table
    if not found:
        batch = f"{training.global_batch_size} x {training.sequence_length}"
        if constraints == Constraints(max_context=constraints.max_context, memory_fraction=constraints.memory_fraction):
            remedy = f"give a batch that has more divisors in common with {cluster.devices}"
        else:
            remedy = f"give fewer restrictions, or a batch that has more divisors in common with {cluster.devices}"
        raise PlanError(f"no plan divides a batch of {batch} over {_devices_text(cluster)} as asked: {remedy}")


def _devices_text(cluster: Cluster) -> str:
    return f"{cluster.devices} device{'s' if cluster.devices > 1 else ''}"


def divisors(number: int) -> list[int]:
    """All divisors of a number, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _pipelines(cluster: Cluster, training: Training, constraints: Constraints) -> list[int]:
    layers = len(training.architecture.layers)
    sizes = [size for size in divisors(cluster.devices) if size <= layers]
    if constraints.pipeline is not None:
        sizes = [size for size in sizes if size == constraints.pipeline]
        if not sizes:
            raise PlanError(
                f"{constraints.pipeline} stages: the number must divide {_devices_text(cluster)} and be at most the model's "
                f"{layers} layers"
            )
    return sizes


def _groups(
    cluster: Cluster, training: Training, constraints: Constraints, pipeline: int
) -> Iterator[tuple[IntArray, ...]]:
    """Columns (tensor, context, data, micro-batch size, micro-batches, recomputation, sharding, sequence parallel)."""
    architecture = training.architecture
    heads = int(np.gcd.reduce([head for layer in architecture.layers for head in (layer.heads, layer.kv_heads)]))
    rest = cluster.devices // pipeline
    for tensor in divisors(int(np.gcd(heads, rest))):
        if constraints.max_tensor is not None and tensor > constraints.max_tensor:
            continue
        for context in divisors(rest // tensor):
            # Each rank gets a piece of the beginning and one of the end, so that the causal mask leaves them equal work.
            if context > constraints.max_context or (context > 1 and training.sequence_length % (2 * context)):
                continue
            data = rest // tensor // context
            if training.global_batch_size % data:
                continue
            rows = training.global_batch_size // data
            counts = np.array(divisors(rows))
            if constraints.micro_batches is not None:
                counts = counts[counts == constraints.micro_batches]
            sequence = [0, 1] if tensor > 1 and training.sequence_length % tensor == 0 else [0]
            if constraints.sequence_parallel is not None:
                sequence = [choice for choice in sequence if choice == int(constraints.sequence_parallel)]
            grid = np.meshgrid(
                counts,
                _recomputations(constraints),
                _shardings(data * context, constraints),
                sequence,
                indexing="ij",
            )
            micro_batches, recomputation, sharding, sequence_parallel = (axis.reshape(-1) for axis in grid)
            sizes = [np.full_like(micro_batches, value) for value in (tensor, context, data)]
            yield (*sizes, rows // micro_batches, micro_batches, recomputation, sharding, sequence_parallel)


def _recomputations(constraints: Constraints) -> list[int]:
    if constraints.recompute is None:
        return [RECOMPUTE_NONE, RECOMPUTE_SELECTIVE, RECOMPUTE_FULL]
    return [RECOMPUTE_SELECTIVE, RECOMPUTE_FULL] if constraints.recompute else [RECOMPUTE_NONE]


def _shardings(ranks: int, constraints: Constraints) -> list[int]:
    if constraints.shard_parameters is True:
        return [SHARD_PARAMETERS] if ranks > 1 else []
    levels = list(range(SHARD_PARAMETERS + 1)) if ranks > 1 else [0]
    return [level for level in levels if level != SHARD_PARAMETERS] if constraints.shard_parameters is False else levels


def _schedules(pipeline: int, training: Training, constraints: Constraints) -> Iterator[tuple[Schedule, int]]:
    if pipeline == 1:
        yield "1f1b", 1
        return
    most = min(MAX_CHUNKS, len(training.architecture.layers) // pipeline)
    for schedule in constraints.schedules:
        if schedule == "1f1b":
            yield schedule, 1
        elif schedule == "zbv" and most >= 2:
            yield schedule, 2
        elif schedule == "interleaved":
            yield from (("interleaved", chunks) for chunks in range(2, most + 1))
        elif schedule == "zero-bubble":
            yield from (("zero-bubble", chunks) for chunks in range(1, most + 1))


def _table(
    software: SoftwareProfile,
    training: Training,
    pipeline: int,
    schedule: Schedule,
    chunks: int,
    columns: list[IntArray],
    ends: tuple[FloatArray, FloatArray],
) -> PlanTable:
    """The rows that the schedule can run, each with even stages, and with balanced ones where they differ."""
    micro_batches, recomputation, sharding = columns[4], columns[5], columns[6]
    allowed = is_runnable(schedule, np.asarray(pipeline), micro_batches, np.asarray(chunks))
    if schedule in SPLIT_BACKWARD:
        # A backward pass in two parts leaves gradients of sharded parameters wrong, without an error, and recomputes
        # activations again for the gradient of every single matrix.
        allowed = allowed & (sharding == SHARD_NONE) & (recomputation == RECOMPUTE_NONE)
    if not reshards_each_micro_batch(pipeline, software):
        # Gradients are whole until the end of the step, as with a sharded optimizer.
        allowed = allowed & (sharding != SHARD_GRADIENTS)
    columns = [column[allowed] for column in columns]
    stages = pipeline * chunks
    layers = len(training.architecture.layers)
    even = np.tile(np.array(even_layers(layers, stages), dtype=np.int64), (len(columns[0]), 1))
    table = _with_stages(pipeline, schedule, chunks, columns, even)
    if stages == 1 or not len(table):
        return table
    variants = [even]
    sources = [np.arange(len(table))]
    for balanced in _balanced(table, layers, ends[0][allowed], ends[1][allowed]):
        different = np.flatnonzero(
            np.all([np.any(balanced != other, axis=1) for other in _full(variants, sources)], axis=0)
        )
        variants.append(balanced[different])
        sources.append(different)
    rows = np.concatenate(sources)
    return _with_stages(pipeline, schedule, chunks, [column[rows] for column in columns], np.concatenate(variants))


def _full(variants: list[IntArray], sources: list[IntArray]) -> list[IntArray]:
    """Each variant of the stages for all rows; even ones where a row does not have it."""
    result = []
    for variant, rows in zip(variants, sources, strict=True):
        stages = variants[0].copy()
        stages[rows] = variant
        result.append(stages)
    return result


def _work_of_ends(
    roofline: Roofline, cluster: Cluster, training: Training, pipeline: int, columns: list[IntArray]
) -> tuple[FloatArray, FloatArray]:
    """What the first and the last stage compute besides their layers, in times of a layer, [n] each.

    Links and sharding do not enter, so that a faster link cannot change how layers are divided.
    """
    device = cluster.device
    unlimited = replace(
        device, node_bytes_per_second=np.inf, network_bytes_per_second=np.inf, package_bytes_per_second=None
    )
    cluster = replace(cluster, device=unlimited)
    roofline = replace(roofline, efficiency=replace(roofline.efficiency, node_hop_s=0.0, network_hop_s=0.0))
    table = _with_stages(pipeline, "1f1b", 1, columns, np.ones((len(columns[0]), pipeline), dtype=np.int64))
    layer = layer_time(roofline, cluster, table, training)
    one = layer.forward_s + layer.backward_s + layer.recompute_s
    embedding, head = embedding_time(roofline, cluster, table, training), head_time(roofline, cluster, table, training)
    return (embedding.forward_s + embedding.backward_s) / one, (head.forward_s + head.backward_s) / one


def _balanced(table: PlanTable, layers: int, first: FloatArray, last: FloatArray) -> list[IntArray]:
    """Stages of equal computation, and ranks of equal computation where they hold several stages, [n, stages] each."""
    stages = layers_balanced_by_stage(layers, table.stages, first, last)
    if table.chunks == 1:
        return [stages]
    return [
        stages,
        layers_balanced_by_rank(layers, table.pipeline, table.chunks, first, last, folded=table.schedule == "zbv"),
    ]


def _with_stages(
    pipeline: int, schedule: Schedule, chunks: int, columns: list[IntArray], stage_layers: IntArray
) -> PlanTable:
    tensor, context, data, size, micro_batches, recomputation, sharding, sequence_parallel = columns
    parallel: BoolArray = sequence_parallel.astype(np.bool_)
    return PlanTable(
        pipeline,
        chunks,
        schedule,
        tensor,
        context,
        data,
        size,
        micro_batches,
        recomputation,
        sharding,
        parallel,
        stage_layers,
    )
