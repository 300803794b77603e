"""The stage-to-rank map is torch's own, for the planner and for the runtime."""

import numpy as np
import pytest
from torch.distributed.pipelining._utils import generate_rank_to_stage_mapping, generate_stage_to_rank_mapping

from moreh.planner.plan.layer_balancing import even_layers
from moreh.planner.plan.plan import SCHEDULES, Plan
from moreh.planner.plan.plan_table import PlanTable, sum_by_rank
from moreh.planner.plan.stage_layout import rank_to_stages, stage_to_rank
from moreh.runtime.sharding.placement import stage_placements


def chunk_counts(schedule):
    return {"1f1b": (1,), "zbv": (2,)}.get(schedule, (1, 2, 3, 4))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_map_is_that_of_torch(schedule, ranks):
    style = "v" if schedule == "zbv" else "loop"
    for chunks in chunk_counts(schedule):
        expected = generate_stage_to_rank_mapping(ranks, ranks * chunks, style)
        assert dict(enumerate(stage_to_rank(schedule, ranks, chunks).tolist())) == expected
        stages = dict(enumerate(rank_to_stages(schedule, ranks, chunks).tolist()))
        assert stages == generate_rank_to_stage_mapping(ranks, ranks * chunks, style)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_runtime_and_plan_tables_use_the_map(schedule):
    ranks = 3
    for chunks in chunk_counts(schedule):
        plan = Plan(even_layers(17, ranks * chunks), pipeline=ranks, chunks=chunks, schedule=schedule)
        expected = stage_to_rank(schedule, ranks, chunks).tolist()
        placements = stage_placements(plan)
        assert [placement.pipeline_rank for placement in placements] == expected
        assert [placement.end_layer - placement.first_layer for placement in placements] == list(plan.stage_layers)
        table = PlanTable.from_plans([plan])
        assert table.stage_ranks.tolist() == expected
        layers = np.bincount(expected, plan.stage_layers, minlength=ranks)
        assert sum_by_rank(table, table.stage_layers.astype(np.float64))[0].tolist() == layers.tolist()
