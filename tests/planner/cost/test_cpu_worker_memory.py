"""Memory that the planner predicts for this project's workers on a CPU: what fully_shard and block attention keep."""

from dataclasses import replace

import numpy as np
import pytest

from moreh.planner.cost.memory import peak_memory
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.plan.plan_table import PlanTable
from moreh.planner.software_profile import moreh_on_cpu
from tests.planner.cost.test_planner_memory import architecture

SOFTWARE = moreh_on_cpu("float32")
LENGTH, HIDDEN, LAYERS = 512, 256, 8
BYTES = 4


def memory_of(plan, software=SOFTWARE, length=LENGTH):
    training = Training(architecture("llama"), plan.global_batch_size, length)
    return peak_memory(PlanTable.from_plans([plan]), training, software)


@pytest.mark.parametrize("sharding", ["optimizer", "gradients"])
def test_fully_shard_keeps_a_gathered_copy_besides_the_shards(sharding):
    whole = memory_of(Plan((LAYERS,), data=4, micro_batches=2)).parameters[0, 0]
    sharded = memory_of(Plan((LAYERS,), data=4, micro_batches=2, sharding=sharding)).parameters[0, 0]
    assert sharded == pytest.approx(whole * (1 + 1 / 4))
    ours = replace(SOFTWARE, uses_fully_shard=False)
    assert memory_of(Plan((LAYERS,), data=4, micro_batches=2, sharding=sharding), ours).parameters[
        0, 0
    ] == pytest.approx(whole)


def test_embedding_and_output_layer_are_gathered_together_for_the_whole_step():
    plan = Plan((LAYERS,), data=4, micro_batch_size=4, sharding="parameters")
    edges = 2 * 500 * HIDDEN * BYTES
    with_edges, without = (
        memory_of(plan, replace(SOFTWARE, uses_fully_shard=fully_shard)).buffers[0, 0] for fully_shard in (True, False)
    )
    assert with_edges >= without + edges


@pytest.mark.parametrize(("length", "has_scores"), [(512, True), (1024, True), (2048, False)])
def test_block_attention_keeps_the_probabilities_of_its_causal_blocks(length, has_scores):
    plan = Plan((LAYERS,), micro_batches=2)
    kept = memory_of(plan, length=length).activations[0, 0]
    fused = memory_of(plan, replace(SOFTWARE, max_blocked_length=0), length).activations[0, 0]
    heads, keys = 4, (length + SOFTWARE.attention_block) / 2
    scores = heads * length * keys * BYTES
    # In the last layer's backward pass, the gradient of the scores may come on top.
    assert kept - fused == (pytest.approx(LAYERS * scores, rel=0.15) if has_scores else 0)


def test_sequence_parallel_ranks_keep_gathered_inputs():
    def activations(*, sequence_parallel, software=SOFTWARE):
        plan = Plan((LAYERS,), tensor=2, micro_batches=2, sequence_parallel=sequence_parallel)
        return memory_of(plan, software).activations[0, 0]

    split = replace(SOFTWARE, keeps_gathered_inputs=False)
    gathered = 2 * LAYERS * LENGTH * HIDDEN * BYTES
    difference = activations(sequence_parallel=True) - activations(sequence_parallel=True, software=split)
    assert difference == pytest.approx(gathered)
    assert activations(sequence_parallel=False) == activations(sequence_parallel=False, software=split)


def test_scratch_buffers_come_on_top():
    plan = Plan((LAYERS,), micro_batches=2)
    without = memory_of(plan, replace(SOFTWARE, scratch_bytes=0)).total
    assert memory_of(plan).total - without == pytest.approx(np.full_like(without, SOFTWARE.scratch_bytes))
