"""What single terms of a prediction depend on: links, sharding in pipelines, split backward passes, frozen weights."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from moreh.accelerator.devices import find_device
from moreh.models.describe.from_source import describe_config
from moreh.planner.cost.layer_time import layer_time
from moreh.planner.cost.prediction import model_flops_per_step, predict
from moreh.planner.hardware.cluster import Cluster, cluster_for_devices, ring_links
from moreh.planner.hardware.environment import make_environment
from moreh.planner.plan.layer_balancing import even_layers
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.plan.plan_table import PlanTable
from moreh.planner.software_profile import MOREH, moreh_software

GCD = find_device("MI250 GCD")
MODEL = {
    "model_type": "llama",
    "num_hidden_layers": 8,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
}
LLAMA = describe_config(MODEL, "llama")
TIED = describe_config({**MODEL, "tie_word_embeddings": True}, "tied")
EIGHT_GCDS = make_environment(cluster_for_devices(GCD, 8))


def make_plan(pipeline=1, chunks=1, data=8, micro_batches=1, **more):
    """A plan for 32 sequences through the 8 layers of LLAMA."""
    return Plan(
        even_layers(8, pipeline * chunks),
        pipeline=pipeline,
        chunks=chunks,
        data=data,
        micro_batch_size=32 // (data * micro_batches),
        micro_batches=micro_batches,
        **more,
    )


def predicted(environment=EIGHT_GCDS, training=None, **choices):
    return predict(make_plan(**choices), training or Training(LLAMA, 32, 512), environment)


@pytest.mark.parametrize(("node", "devices"), [(6, 12), (8, 24), (8, 16), (4, 4)])
def test_ring_is_inside_a_node_only_if_all_groups_are(node, devices):
    cluster = Cluster(GCD, devices, node)
    seen = set()
    for size, stride in product(range(2, devices + 1), range(1, devices + 1)):
        if devices % (size * stride):
            continue
        groups = [
            [start + offset + stride * k for k in range(size)]
            for start in range(0, devices, size * stride)
            for offset in range(stride)
        ]
        crosses = any(group[0] // node != group[-1] // node for group in groups)
        links = ring_links(cluster, np.array([size]), np.array([stride]))
        assert bool(links.across_nodes[0]) == crosses, (size, stride)
        seen.add(crosses)
    assert seen == ({True, False} if devices > node else {False})


def test_network_ports_of_a_node_are_shared_by_the_groups_in_it():
    cluster = cluster_for_devices(GCD, 16)
    port_rate = GCD.network_bytes_per_second
    one_ring, eight_rings = (
        ring_links(cluster, np.array([size]), np.array([stride])).bytes_per_second[0]
        for size, stride in ((16, 1), (2, 8))
    )
    assert one_ring == min(8 * port_rate, GCD.node_bytes_per_second)
    assert eight_rings == port_rate


def test_sharded_parameters_in_a_torch_pipeline_are_gathered_once_a_step():
    """PipelineStage with fully_shard gathers parameters and reduces gradients once a step, not for each micro-batch."""
    one_stage = predicted(sharding="parameters", micro_batches=4)
    assert one_stage.parts.data_exchange_s > 0
    assert one_stage.memory[0].gradients == pytest.approx(LLAMA.parameters * 4 / 8)
    two_stages = predicted(pipeline=2, data=4, micro_batches=4, sharding="parameters")
    assert two_stages.parts.data_exchange_s == pytest.approx(0, abs=1e-9)
    shard = two_stages.memory[0].optimizer * 4 / 8
    assert two_stages.memory[0].gradients == pytest.approx(4 * shard)
    assert two_stages.memory[0].parameters == pytest.approx((4 / 4 + 2) * shard)
    resharded = predicted(
        replace(EIGHT_GCDS, software=replace(MOREH, reshards_in_pipeline=True)),
        pipeline=2,
        data=4,
        micro_batches=4,
        sharding="parameters",
    )
    assert resharded.parts.data_exchange_s > 0
    assert resharded.memory_bytes < two_stages.memory_bytes


def test_split_backward_pass_keeps_gradients_until_the_weights_are_done():
    whole = predicted(pipeline=4, data=2, micro_batches=8)
    split = predicted(pipeline=4, data=2, micro_batches=8, schedule="zero-bubble")
    tokens = 2 * 512
    # q, k, v, o, gate, up, down and two norms: 2 bytes an element
    result_gradients = tokens * (4 * 1024 + 2 * 2816 + 1024 + 2 * 1024) * 2
    logit_gradients = tokens * LLAMA.vocabulary * 2
    extra = split.memory[3].activations - whole.memory[3].activations
    # The last of 4 ranks delays 4 backward passes of its 2 layers, and holds 4 micro-batches instead of 1.
    kept = whole.memory[3].activations
    assert extra == pytest.approx(4 * (2 * result_gradients + logit_gradients) + 3 * kept, rel=0.02)
    assert split.parts.gradients_s > whole.parts.gradients_s  # nothing hides the exchange
    assert split.parts.bubble_s < whole.parts.bubble_s


def test_tied_embedding_is_held_once_if_first_and_last_stage_share_a_rank():
    training = Training(TIED, 32, 512)
    folded = predicted(training=training, pipeline=4, chunks=2, data=2, micro_batches=8, schedule="zbv")
    looped = predicted(training=training, pipeline=4, chunks=2, data=2, micro_batches=8, schedule="interleaved")
    embedding = TIED.embedding_parameters
    folded_parameters, looped_parameters = (
        sum(rank.optimizer for rank in prediction.memory) / 8 for prediction in (folded, looped)
    )
    assert looped_parameters - folded_parameters == pytest.approx(embedding)
    assert folded_parameters == pytest.approx(TIED.parameters)


def test_frozen_parameters_have_no_gradients_and_no_optimizer_state():
    layer = replace(LLAMA.layers[0], linears=tuple(replace(linear, frozen=True) for linear in LLAMA.layers[0].linears))
    layer = replace(layer, frozen_other_parameters=layer.other_parameters, frozen_other_tensors=layer.other_tensors)
    frozen = replace(
        LLAMA,
        layers=(layer,) * 8,
        embedding_frozen=True,
        head_frozen=True,
        frozen_final_parameters=LLAMA.final_parameters,
        frozen_final_tensors=LLAMA.final_tensors,
    )
    assert frozen.trainable_parameters == 0
    training = Training(frozen, 32, 512)
    for sharding in ("none", "optimizer", "gradients"):
        assert predicted(training=training, sharding=sharding).parts.gradients_s == pytest.approx(0, abs=1e-4)
    assert predicted(training=training).memory[0].gradients == predicted(training=training).memory[0].optimizer == 0
    assert predicted(training=training).parts.computation_s < predicted().parts.computation_s * 0.8
    assert model_flops_per_step(training) < model_flops_per_step(Training(LLAMA, 32, 512))


def test_float8_on_devices_without_it_takes_as_long_as_half_precision():
    assert GCD.float8_flops_per_second is None
    environment = replace(EIGHT_GCDS, software=moreh_software("float8"))
    assert predicted(environment).step_time_s == pytest.approx(predicted().step_time_s)


def test_embedding_over_tensor_parallel_ranks_is_reduced():
    training = Training(replace(LLAMA, layers=LLAMA.layers[:1]), 32, 512)
    whole = predict(replace(make_plan(), stage_layers=(1,)), training, EIGHT_GCDS)
    split = predict(Plan((1,), tensor=8, micro_batch_size=32), training, EIGHT_GCDS)
    assert whole.parts.tensor_exchange_s == 0
    assert split.parts.tensor_exchange_s > 0


def test_output_layer_is_never_in_float8():
    cluster = cluster_for_devices(find_device("H100 80GB"), 1)
    half, low = (make_environment(cluster, moreh_software(compute)).roofline for compute in ("half", "float8"))
    assert low.matmul_s(8192, 8192, 8192) < half.matmul_s(8192, 8192, 8192)
    assert low.matmul_s(8192, 8192, 8192, float8=False) == half.matmul_s(8192, 8192, 8192)
    # Few rows: converting the weights takes longer than the matmul saves.
    assert low.matmul_s(16, 8192, 8192) > half.matmul_s(16, 8192, 8192)


def test_dropout_that_is_part_of_an_addition_moves_less():
    cluster = cluster_for_devices(find_device("A100 80GB"), 1)
    plan = Plan((8,), micro_batch_size=8, micro_batches=1)
    training = Training(replace(LLAMA, dropout=True), 8, 1024)

    def seconds(fuses):
        return predict(plan, training, make_environment(cluster, replace(MOREH, fuses_dropout=fuses))).step_time_s

    assert seconds(True) < seconds(False)


@pytest.mark.parametrize(("sharding", "shards"), [("none", 1), ("gradients", 8), ("optimizer", 1)])
def test_gradients_are_added_to_those_of_earlier_micro_batches(sharding, shards):
    whole = replace(EIGHT_GCDS, efficiency=replace(EIGHT_GCDS.efficiency, slowdown=1.0))
    adding = replace(whole, software=replace(MOREH, adds_gradients=True))
    for micro_batches in (1, 4):
        plain, added = (
            predicted(environment, micro_batches=micro_batches, sharding=sharding) for environment in (whole, adding)
        )
        # All additions but that of the first micro-batch read two numbers and write one.
        numbers = 3 * (micro_batches - 1) * LLAMA.parameters / shards
        expected_s = numbers * MOREH.gradient_bytes / EIGHT_GCDS.roofline.memory_rate
        difference_s = sum(added.stage_backward_s) - sum(plain.stage_backward_s)
        assert micro_batches * difference_s == pytest.approx(expected_s, rel=1e-6)


@pytest.mark.parametrize(
    ("sharding", "forwards", "backwards"),
    [("none", 0, 0), ("optimizer", 1, 1), ("gradients", 1, 4), ("parameters", 4, 4)],
)
def test_ranks_wait_at_each_layer_that_they_exchange(sharding, forwards, backwards):
    """A step has 4 micro-batches. Sharded layers are gathered in so many, and their gradients are reduced."""
    software = replace(MOREH, uses_fully_shard=True, overlaps_data_parallel=False)
    efficiency = replace(EIGHT_GCDS.efficiency, skew=0.0, slowdown=1.0)
    even = predicted(replace(EIGHT_GCDS, software=software, efficiency=efficiency), micro_batches=4, sharding=sharding)
    uneven = predicted(
        replace(EIGHT_GCDS, software=software, efficiency=replace(efficiency, skew=0.1)),
        micro_batches=4,
        sharding=sharding,
    )
    layers = layer_time(
        replace(EIGHT_GCDS.roofline, software=software, efficiency=efficiency),
        EIGHT_GCDS.cluster,
        PlanTable.from_plans([even.plan]),
        Training(LLAMA, 32, 512),
    )
    for stage_s, pass_s, passes in (
        ("stage_forward_s", layers.whole_forward_s, forwards),
        ("stage_backward_s", layers.whole_backward_s, backwards),
    ):
        waits_s = getattr(uneven, stage_s)[0] - getattr(even, stage_s)[0]
        assert waits_s == pytest.approx(0.1 * 8 * float(pass_s[0]) * passes / 4, rel=1e-6)


@pytest.mark.parametrize(("keeps_parts", "repeated"), [(False, 0), (True, 1)])
def test_selective_recomputation_repeats_the_sum_after_attention_if_only_its_parts_are_kept(keeps_parts, repeated):
    software = replace(MOREH, keeps_gathered_inputs=keeps_parts)
    environment = replace(EIGHT_GCDS, software=software, efficiency=replace(EIGHT_GCDS.efficiency, skew=0.0))
    plain, selective = (
        predicted(environment, data=4, tensor=2, recomputation=recomputation) for recomputation in ("none", "selective")
    )
    # Two sums in each direction.
    factor = (4 + repeated) / 4
    assert selective.parts.tensor_exchange_s == pytest.approx(factor * plain.parts.tensor_exchange_s)
