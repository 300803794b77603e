"""Memory that the planner predicts for this project's workers on a CPU: what fully_shard and block attention keep."""

from dataclasses import replace

import numpy as np
import pytest

from moreh.planner.cost.memory.edge_exchange import edge_exchange
from moreh.planner.cost.memory.memory_states import model_states
from moreh.planner.cost.memory.peak_memory import _deferred_bytes, peak_memory
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.plan.plan_table import PlanTable
from moreh.planner.plan.schedules import peak_deferred_weight_grads
from moreh.planner.software_profile import moreh_on_cpu
from tests.planner.cost.test_planner_memory import architecture

SOFTWARE = moreh_on_cpu("float32")
LENGTH, HIDDEN, LAYERS = 512, 256, 8
BYTES = 4
TRAINING = Training(architecture("llama"), 8, LENGTH)


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
    table = PlanTable.from_plans([Plan((LAYERS,), data=4, micro_batch_size=4, sharding="parameters")])
    for software, expected in (
        (SOFTWARE, (2 * 500 + 1) * HIDDEN * BYTES),
        (replace(SOFTWARE, uses_fully_shard=False), 0),
    ):
        edges = edge_exchange(model_states(table, TRAINING, software), table, TRAINING, software)
        assert edges.gathered == pytest.approx(expected)


@pytest.mark.parametrize("length", [512, 768, pytest.param(1024, id="more than 8 MiB"), pytest.param(2048, id="fused")])
def test_block_attention_keeps_the_probabilities_of_its_causal_blocks(length):
    plan = Plan((LAYERS,), micro_batches=2)
    kept = memory_of(plan, length=length).activations[0, 0]
    fused = memory_of(plan, replace(SOFTWARE, max_blocked_length=0), length).activations[0, 0]
    heads, keys = 4, (length + SOFTWARE.attention_block) / 2
    scores = heads * length * keys * BYTES
    # In the last layer's backward pass, the tensors of attention's own backward pass may come on top.
    if length <= 768:
        assert kept - fused == pytest.approx(LAYERS * scores, rel=0.15)
    elif length == 1024:
        assert 0 <= kept - fused <= scores
    else:
        assert kept - fused == 0


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


def test_the_only_micro_batch_leaves_shards_of_gradients_alone():
    """fully_shard reduces each layer's gradients in the micro-batch's backward pass, though `optimizer` is sharded."""
    one, two = (
        memory_of(
            Plan((LAYERS,), data=4, micro_batches=count, sharding="optimizer"), replace(SOFTWARE, scratch_bytes=0)
        )
        for count in (1, 2)
    )
    states = two.parameters + two.optimizer
    assert two.gradients[0, 0] == pytest.approx(two.parameters[0, 0] / (1 + 1 / 4))
    assert one.gradients[0, 0] <= two.gradients[0, 0] / 4
    assert (one.total - states)[0, 0] < (two.total - states)[0, 0]


def test_gathered_layers_are_freed_in_the_last_micro_batch():
    """fully_shard keeps them for all micro-batches where parameters are not to be sharded, and none in a pipeline."""
    layer = architecture("llama").layers[0].parameters
    plans = {
        "optimizer": (Plan((LAYERS,), data=4, sharding="optimizer"), LAYERS * layer * BYTES),
        "gradients": (Plan((LAYERS,), data=4, sharding="gradients"), LAYERS * layer * BYTES),
        "parameters": (Plan((LAYERS,), data=4, sharding="parameters"), 0),
        "none": (Plan((LAYERS,), data=4), 0),
        "pipeline": (Plan((4, 4), pipeline=2, data=2, sharding="optimizer"), 0),
    }
    for name, (plan, expected) in plans.items():
        table = PlanTable.from_plans([plan])
        assert model_states(table, TRAINING, SOFTWARE).layer_copy_bytes == pytest.approx(expected), name
    # With full recomputation, the passes of the first layers are the highest moments: after most copies are freed.
    one, two = (
        memory_of(Plan((LAYERS,), data=4, micro_batches=count, sharding="gradients", recomputation="full"))
        for count in (1, 2)
    )
    assert one.total[0, 0] < two.total[0, 0]


def test_gradients_that_are_not_sharded_are_reduced_through_a_buffer():
    large = replace(SOFTWARE, all_reduce_bytes=1e12)
    alone, two, two_sharded = (
        memory_of(plan, large, length=8).buffers[0, 0]
        for plan in (
            Plan((LAYERS,), micro_batches=2),
            Plan((LAYERS,), data=2, micro_batches=2),
            Plan((LAYERS,), data=2, micro_batches=2, sharding="optimizer"),
        )
    )
    gradients = memory_of(Plan((LAYERS,), micro_batches=2), length=8).gradients[0, 0]
    assert two == gradients + SOFTWARE.scratch_bytes
    assert max(alone, two_sharded) < gradients


def test_a_rank_with_all_micro_batches_in_flight_has_no_gradients():
    """At the peak of 1F1B, the first of two ranks has two micro-batches in flight: all of two, but not all of four."""
    two, four = (memory_of(Plan((4, 4), pipeline=2, micro_batch_size=4, micro_batches=count)) for count in (2, 4))
    assert four.activations[0, 0] == pytest.approx(two.activations[0, 0], rel=0.1)
    assert four.gradients[0, 0] == pytest.approx(four.parameters[0, 0])
    assert two.gradients[0, 0] < 0.5 * four.gradients[0, 0]


@pytest.mark.parametrize("schedule", ["zero-bubble", "zbv"])
def test_weights_gradients_that_are_put_off_keep_the_gradients_of_results(schedule):
    chunks = 2 if schedule == "zbv" else 1
    layers = (LAYERS // 2 // chunks,) * 2 * chunks
    plan = Plan(layers, pipeline=2, chunks=chunks, schedule=schedule, micro_batch_size=1, micro_batches=8)
    deferred = peak_deferred_weight_grads(schedule, 2, 8, chunks)
    # Queries, keys, values, output, gate, up, down and two norms; and the logits, on the last stage's rank.
    columns = sum(linear.outputs for linear in architecture("llama").layers[0].linears) + 2 * HIDDEN
    layer_bytes = layers[0] * columns * LENGTH * BYTES
    logit_bytes = 500 * LENGTH * BYTES
    assert _deferred_bytes(PlanTable.from_plans([plan]), TRAINING, SOFTWARE)[0] == pytest.approx(
        deferred * (layer_bytes + np.array([schedule == "zbv", schedule != "zbv"]) * logit_bytes)
    )
    plain = replace(plan, schedule="1f1b", chunks=1, stage_layers=(4, 4))
    assert memory_of(plan).total.max() > memory_of(plain).total.max()
