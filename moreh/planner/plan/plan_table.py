"""Many plans as arrays, the input of the vectorized cost functions."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from moreh.planner.plan.arrays import BoolArray, FloatArray, IntArray
from moreh.planner.plan.plan import RECOMPUTATIONS, SHARDINGS, Plan, Schedule
from moreh.planner.plan.stage_layout import stage_to_rank

# Codes of `PlanTable.recomputation` and `PlanTable.sharding`. A larger sharding code shards more.
RECOMPUTE_NONE, RECOMPUTE_SELECTIVE, RECOMPUTE_FULL = range(len(RECOMPUTATIONS))
SHARD_NONE, SHARD_OPTIMIZER, SHARD_GRADIENTS, SHARD_PARAMETERS = range(len(SHARDINGS))


@dataclass(frozen=True)
class PlanTable:
    """`n` plans with the same pipeline size, number of chunks and schedule. `Plan` documents the fields."""

    pipeline: int
    chunks: int
    schedule: Schedule
    tensor: IntArray  # [n]
    context: IntArray  # [n]
    expert: IntArray  # [n]
    data: IntArray  # [n]
    micro_batch_size: IntArray  # [n]
    micro_batches: IntArray  # [n]
    recomputation: IntArray  # [n], a RECOMPUTE_... code: an index into RECOMPUTATIONS
    sharding: IntArray  # [n], a SHARD_... code: an index into SHARDINGS
    replicas: IntArray  # [n]
    sequence_parallel: BoolArray  # [n]
    stage_layers: IntArray  # [n, pipeline * chunks]

    def __len__(self) -> int:
        return len(self.tensor)

    @property
    def stages(self) -> int:
        """Stages of the pipeline, over all ranks and chunks."""
        return self.pipeline * self.chunks

    @property
    def stage_ranks(self) -> IntArray:
        """The pipeline rank that holds each stage, [stages]."""
        return stage_to_rank(self.schedule, self.pipeline, self.chunks)

    @property
    def shard_ranks(self) -> IntArray:
        """The data- and context-parallel ranks that shard together, [n]."""
        return self.data * self.context // self.replicas

    def take(self, rows: IntArray) -> "PlanTable":
        """The plans at these rows."""
        arrays = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("pipeline", "chunks", "schedule")
        }
        return replace(self, **{name: array[rows] for name, array in arrays.items()})

    def plan(self, row: int) -> Plan:
        """One row as a plan."""
        return Plan(
            stage_layers=tuple(int(count) for count in self.stage_layers[row]),
            tensor=int(self.tensor[row]),
            pipeline=self.pipeline,
            data=int(self.data[row]),
            context=int(self.context[row]),
            expert=int(self.expert[row]),
            micro_batch_size=int(self.micro_batch_size[row]),
            micro_batches=int(self.micro_batches[row]),
            schedule=self.schedule,
            chunks=self.chunks,
            recomputation=RECOMPUTATIONS[int(self.recomputation[row])],
            sharding=SHARDINGS[int(self.sharding[row])],
            replicas=int(self.replicas[row]),
            sequence_parallel=bool(self.sequence_parallel[row]),
        )

    @classmethod
    def from_plans(cls, plans: Sequence[Plan]) -> "PlanTable":
        """Plans with the same pipeline size, number of chunks and schedule as a table, one row each."""
        first = plans[0]

        def column(values: list[int]) -> IntArray:
            return np.array(values, dtype=np.int64)

        return cls(
            pipeline=first.pipeline,
            chunks=first.chunks,
            schedule=first.schedule,
            tensor=column([p.tensor for p in plans]),
            context=column([p.context for p in plans]),
            expert=column([p.expert for p in plans]),
            data=column([p.data for p in plans]),
            micro_batch_size=column([p.micro_batch_size for p in plans]),
            micro_batches=column([p.micro_batches for p in plans]),
            recomputation=column([RECOMPUTATIONS.index(p.recomputation) for p in plans]),
            sharding=column([SHARDINGS.index(p.sharding) for p in plans]),
            replicas=column([p.replicas for p in plans]),
            sequence_parallel=np.array([p.sequence_parallel for p in plans], dtype=np.bool_),
            stage_layers=np.array([p.stage_layers for p in plans], dtype=np.int64),
        )


def sum_by_rank(plans: PlanTable, per_stage: FloatArray) -> FloatArray:
    """Sums over the stages that each pipeline rank holds: [n, stages] -> [n, pipeline]."""
    result = np.zeros((len(plans), plans.pipeline))
    ranks = plans.stage_ranks
    for chunk in range(plans.chunks):
        stages = slice(chunk * plans.pipeline, (chunk + 1) * plans.pipeline)
        result[:, ranks[stages]] += per_stage[:, stages]
    return result
