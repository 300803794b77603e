"""The exchange of sharded parameters and gradients: hybrid sharding, single collectives for matrices."""

from dataclasses import replace

import pytest

from moreh.accelerator.devices import find_device
from moreh.errors import OptionError, PlanError
from moreh.models.describe.from_source import describe_config
from moreh.planner.calibration.support import least_factor
from moreh.planner.cost.prediction import predict
from moreh.planner.hardware.cluster import cluster_for_devices
from moreh.planner.hardware.environment import make_environment
from moreh.planner.plan.notation import parse_plan, plan_text
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.search.candidates import candidate_tables
from moreh.planner.search.constraints import Constraints
from moreh.runtime.engine.parallel_model import build_sharded

MODEL = {
    "model_type": "llama",
    "num_hidden_layers": 8,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
LLAMA = describe_config(MODEL, "llama")
GPU = find_device("A100 80GB")
SIXTEEN = make_environment(cluster_for_devices(GPU, 16))
TRAINING = Training(LLAMA, 16, 512)


def predicted(environment=SIXTEEN, **choices):
    return predict(Plan((8,), data=16, **{"sharding": "parameters", **choices}), TRAINING, environment)


def without_overlap(environment):
    return replace(environment, software=replace(environment.software, overlaps_data_parallel=False))


def test_hybrid_sharding_holds_more_and_exchanges_less_over_the_network():
    whole, hybrid, none = predicted(), predicted(replicas=2), predicted(sharding="none")
    for kind in ("gradients", "optimizer"):
        assert getattr(hybrid.memory[0], kind) == pytest.approx(2 * getattr(whole.memory[0], kind))
        assert getattr(hybrid.memory[0], kind) == pytest.approx(getattr(none.memory[0], kind) / 8)
    # A network as slow as that of one port is used by half of the shards' gradients only.
    slow = without_overlap(make_environment(cluster_for_devices(GPU, 16, network_bytes_per_second=1e9)))
    slow = replace(slow, software=replace(slow.software, rings_use_all_ports=False))
    assert predicted(slow, replicas=2).parts.data_exchange_s < 0.2 * predicted(slow).parts.data_exchange_s


def test_replicas_add_up_their_shards_of_gradients_over_the_network():
    environment = without_overlap(SIXTEEN)
    efficiency = environment.efficiency
    extra = predicted(environment, replicas=2, sharding="gradients").parts.data_exchange_s
    without = predict(
        Plan((8,), data=8, micro_batch_size=2, sharding="gradients"),
        TRAINING,
        without_overlap(make_environment(cluster_for_devices(GPU, 8))),
    ).parts.data_exchange_s
    # An all-reduce of a device's eighth of the gradients, over two nodes, each with one port.
    seconds = LLAMA.parameters / 8 * 4 / (GPU.network_bytes_per_second * efficiency.network)
    seconds += 2 * 10 * efficiency.network_hop_s  # 8 layers, the embedding, the output layer
    assert extra - without == pytest.approx(seconds * efficiency.slowdown, rel=0.01)


def test_text_of_hybrid_sharding_is_read_back():
    plan = parse_plan("dp16 shard:parameters:8", TRAINING, 16)
    assert (plan.replicas, plan.shard_ranks) == (2, 8)
    assert parse_plan(plan_text(plan), TRAINING, 16) == plan
    assert plan_text(parse_plan("dp16 shard:parameters:16", TRAINING, 16)).endswith("shard:parameters")
    for text, message in (
        ("dp16 shard:parameters:3", "do not divide the 16"),
        ("dp16 shard:parameters:0", "give a divisor of 16"),
        ("dp16 shard:none:8", "nothing to shard"),
    ):
        with pytest.raises(PlanError, match=message):
            parse_plan(text, TRAINING, 16)


def test_hybrid_sharding_is_predicted_with_a_wide_interval_but_never_chosen_or_run():
    plan = parse_plan("dp16 shard:parameters:8", TRAINING, 16)
    factor, reason = least_factor(plan, TRAINING, SIXTEEN)
    assert factor > 1.4
    assert "hybrid sharding" in reason
    for table in candidate_tables(SIXTEEN.roofline, SIXTEEN.cluster, TRAINING, Constraints()):
        assert (table.replicas == 1).all()
    with pytest.raises(OptionError, match="shard:parameters:8: hybrid sharding is predicted, but cannot be run"):
        build_sharded(None, plan, None, None, None)


def test_a_collective_for_each_matrix_has_the_latency_of_each():
    environment = without_overlap(SIXTEEN)
    single = replace(environment, software=replace(environment.software, exchanges_each_matrix=True))
    difference = predicted(single).step_time_s - predicted(environment).step_time_s
    # 7 matrices instead of one collective in each of 8 layers; two gathers and a reduction over 15 hops.
    hops = 8 * 6 * 3 * 15 * environment.efficiency.network_hop_s
    assert difference == pytest.approx(hops * environment.efficiency.slowdown, rel=1e-6)
