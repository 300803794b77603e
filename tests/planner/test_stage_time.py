"""What single terms of a prediction depend on: links of groups, sharding in pipelines, split backward passes, frozen parts."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from moreh.accelerator.devices import find_device
from moreh.models.describe.from_source import describe_config
from moreh.planner.cost.prediction import model_flops_per_step, predict
from moreh.planner.hardware.cluster import Cluster, cluster_for_devices, ring_links
from moreh.planner.hardware.environment import make_environment
from moreh.planner.plan.layer_balancing import even_layers, layers_balanced_by_rank
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.software_profile import MOREH, moreh_software

DEVICE = find_device("MI250 GCD")
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
EIGHT = make_environment(cluster_for_devices(DEVICE, 8))


def plan(pipeline=1, chunks=1, data=8, count=1, batch=32, **more):
    size = batch // (data * count)
    return Plan(
        even_layers(8, pipeline * chunks),
        pipeline=pipeline,
        chunks=chunks,
        data=data,
        micro_batch_size=size,
        micro_batches=count,
        **more,
    )


def at(environment=EIGHT, training=None, **choices):
    return predict(plan(**choices), training or Training(LLAMA, 32, 512), environment)


@pytest.mark.parametrize(("node", "devices"), [(6, 12), (8, 24), (8, 16), (4, 4)])
def test_a_ring_is_inside_a_node_only_if_all_groups_are(node, devices):
    cluster = Cluster(DEVICE, devices, node)
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
    cluster = cluster_for_devices(DEVICE, 16)
    ports = DEVICE.network_bytes_per_second
    whole, one = (ring_links(cluster, np.array([s]), np.array([t])).bytes_per_second[0] for s, t in ((16, 1), (2, 8)))
    assert whole == min(8 * ports, DEVICE.node_bytes_per_second)
    assert one == ports


def test_sharded_parameters_in_a_pipeline_of_torch_are_whole_between_the_steps_ends():
    """PipelineStage gathers parameters and reduces gradients of fully_shard once a step, and not for each micro-batch."""
    one_stage = at(sharding="parameters", count=4)
    assert one_stage.parts.data_exchange_s > 0
    assert one_stage.memory[0].gradients == pytest.approx(LLAMA.parameters * 4 / 8)
    torch = at(pipeline=2, data=4, count=4, sharding="parameters")
    assert torch.parts.data_exchange_s == pytest.approx(0, abs=1e-9)
    held = torch.memory[0].optimizer * 4 / 8
    assert torch.memory[0].gradients == pytest.approx(4 * held)
    assert torch.memory[0].parameters == pytest.approx((4 / 4 + 2) * held)
    other = at(
        replace(EIGHT, software=replace(MOREH, reshards_in_pipeline=True)),
        pipeline=2,
        data=4,
        count=4,
        sharding="parameters",
    )
    assert other.parts.data_exchange_s > 0
    assert other.memory_bytes < torch.memory_bytes


def test_a_split_backward_pass_holds_gradients_until_the_weights_are_done():
    whole, split = at(pipeline=4, data=2, count=8), at(pipeline=4, data=2, count=8, schedule="zero-bubble")
    tokens = 2 * 512
    results = tokens * (4 * 1024 + 3 * 2816 - 2816 + 1024) * 2  # q, k, v, o, gate, up, down: 2 bytes an element
    extra = split.memory[3].activations - whole.memory[3].activations
    # The last of 4 ranks delays 4 backward passes of its 2 layers, and holds 4 micro-batches instead of 1.
    kept = whole.memory[3].activations
    assert extra == pytest.approx(4 * 2 * results + 3 * kept, rel=0.02)
    assert split.parts.gradients_s > whole.parts.gradients_s  # nothing hides the exchange
    assert split.parts.bubble_s < whole.parts.bubble_s


def test_tied_embedding_is_held_once_where_both_ends_are_on_one_rank():
    training = Training(TIED, 32, 512)
    folded = at(training=training, pipeline=4, chunks=2, data=2, count=8, schedule="zbv")
    looped = at(training=training, pipeline=4, chunks=2, data=2, count=8, schedule="interleaved")
    embedding = TIED.embedding_parameters
    total = {name: sum(rank.optimizer for rank in p.memory) / 8 for name, p in (("zbv", folded), ("loop", looped))}
    assert total["loop"] - total["zbv"] == pytest.approx(embedding)
    assert total["zbv"] == pytest.approx(TIED.parameters)


def test_frozen_parameters_cost_no_gradient():
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
        assert at(training=training, sharding=sharding).parts.gradients_s == pytest.approx(0, abs=1e-4)
    assert at(training=training).memory[0].gradients == at(training=training).memory[0].optimizer == 0
    assert at(training=training).parts.computation_s < at().parts.computation_s * 0.8
    assert model_flops_per_step(training) < model_flops_per_step(Training(LLAMA, 32, 512))


def test_float8_without_units_for_it_is_half_precision():
    assert DEVICE.float8_flops_per_second is None
    environment = replace(EIGHT, software=moreh_software("float8"))
    assert at(environment).step_time_s == pytest.approx(at().step_time_s)


def test_an_embedding_over_tensor_parallel_ranks_is_added_up():
    alone, split = plan(), Plan((8,), tensor=8, micro_batch_size=32)
    training = Training(replace(LLAMA, layers=LLAMA.layers[:1]), 32, 512)
    one = replace(alone, stage_layers=(1,)), replace(split, stage_layers=(1,))
    predictions = [predict(p, training, EIGHT) for p in one]
    assert predictions[0].parts.tensor_exchange_s == 0
    assert predictions[1].parts.tensor_exchange_s > 0


def test_balanced_ranks_are_optimal():
    generator = np.random.default_rng(4)
    compared = 0
    for _ in range(60):
        ranks, chunks = int(generator.integers(2, 4)), int(generator.integers(2, 4))
        layers = int(generator.integers(2 * ranks * chunks, 20))
        folded = chunks == 2 and bool(generator.integers(2))
        embedding, head = generator.uniform(0, 1, 1), generator.uniform(0, 3, 1)
        found = layers_balanced_by_rank(layers, ranks, chunks, embedding, head, folded=folded)[0]
        assert found.sum() == layers
        assert found.min() >= 1
        stages = np.arange(ranks * chunks)
        rank_of = np.minimum(stages, 2 * ranks - 1 - stages) if folded else stages % ranks

        def load(totals, embedding=embedding, head=head, rank_of=rank_of):
            loads = np.array(totals, dtype=float)
            loads[rank_of[0]] += embedding[0]
            loads[rank_of[-1]] += head[0]
            return loads.max()

        totals = np.bincount(rank_of, found, minlength=ranks)
        best = min(load(t) for t in product(range(chunks, layers + 1), repeat=ranks) if sum(t) == layers)
        assert load(totals) == pytest.approx(best)
        compared += 1
    assert compared == 60
