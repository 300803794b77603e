"""Many plans at once, as arrays: what the cost functions work on."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from moreh.planner.plan.arrays import Booleans, Floats, Integers
from moreh.planner.plan.plan import RECOMPUTATIONS, SHARDINGS, Plan, Schedule

NONE, SELECTIVE, FULL = range(len(RECOMPUTATIONS))
WHOLE, OPTIMIZER, GRADIENTS, PARAMETERS = range(len(SHARDINGS))


@dataclass(frozen=True)
class PlanTable:
    """`n` plans with the same pipeline: the fields of `Plan`, [n] each, and `stage_layers` as [n, pipeline * chunks].

    `recomputation` and `sharding` are places in RECOMPUTATIONS and SHARDINGS.
    """

    pipeline: int
    chunks: int
    schedule: Schedule
    tensor: Integers
    context: Integers
    data: Integers
    micro_batch_size: Integers
    micro_batches: Integers
    recomputation: Integers
    sharding: Integers
    sequence_parallel: Booleans
    stage_layers: Integers

    def __len__(self) -> int:
        return len(self.tensor)

    @property
    def stages(self) -> int:
        """Stages of the pipeline, over all ranks and chunks."""
        return self.pipeline * self.chunks

    def rows(self, places: Integers) -> "PlanTable":
        """The rows at these places."""
        arrays = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("pipeline", "chunks", "schedule")
        }
        return replace(self, **{name: array[places] for name, array in arrays.items()})

    def plan(self, row: int) -> Plan:
        """One row as a plan."""
        return Plan(
            stage_layers=tuple(int(count) for count in self.stage_layers[row]),
            tensor=int(self.tensor[row]),
            pipeline=self.pipeline,
            data=int(self.data[row]),
            context=int(self.context[row]),
            micro_batch_size=int(self.micro_batch_size[row]),
            micro_batches=int(self.micro_batches[row]),
            schedule=self.schedule,
            chunks=self.chunks,
            recomputation=RECOMPUTATIONS[int(self.recomputation[row])],
            sharding=SHARDINGS[int(self.sharding[row])],
            sequence_parallel=bool(self.sequence_parallel[row]),
        )


def table_of_plans(plans: Sequence[Plan]) -> PlanTable:
    """Plans with the same pipeline size, chunks and schedule as a table, a row each."""
    first = plans[0]

    def column(values: list[int]) -> Integers:
        return np.array(values, dtype=np.int64)

    return PlanTable(
        pipeline=first.pipeline,
        chunks=first.chunks,
        schedule=first.schedule,
        tensor=column([p.tensor for p in plans]),
        context=column([p.context for p in plans]),
        data=column([p.data for p in plans]),
        micro_batch_size=column([p.micro_batch_size for p in plans]),
        micro_batches=column([p.micro_batches for p in plans]),
        recomputation=column([RECOMPUTATIONS.index(p.recomputation) for p in plans]),
        sharding=column([SHARDINGS.index(p.sharding) for p in plans]),
        sequence_parallel=np.array([p.sequence_parallel for p in plans], dtype=np.bool_),
        stage_layers=np.array([p.stage_layers for p in plans], dtype=np.int64),
    )


def stage_ranks(plans: PlanTable) -> Integers:
    """The pipeline rank that holds each stage, [stages]: in turn, or there and back with the V-shaped schedule."""
    stages = np.arange(plans.stages)
    if plans.schedule == "zbv":
        return np.minimum(stages, plans.stages - 1 - stages)
    return stages % plans.pipeline


def per_rank(plans: PlanTable, stages: Floats) -> Floats:
    """Sums over the stages that each pipeline rank holds: [n, stages] -> [n, pipeline]."""
    result = np.zeros((len(plans), plans.pipeline))
    ranks = stage_ranks(plans)
    for chunk in range(plans.chunks):
        here = slice(chunk * plans.pipeline, (chunk + 1) * plans.pipeline)
        result[:, ranks[here]] += stages[:, here]
    return result
