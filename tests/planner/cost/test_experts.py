"""A mixture of experts: what a token uses, what ranks hold, and what the exchange of tokens costs."""

from dataclasses import replace

import pytest

from moreh.errors import PlanError
from moreh.models.describe.from_source import describe, describe_config
from moreh.planner.cost.memory.peak_memory import peak_memory
from moreh.planner.cost.prediction import model_flops_per_step, predict
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.plan.plan_table import PlanTable
from tests.helpers.planner.cases import MODELS, environment_of

MIXTRAL = describe(MODELS / "mixtral_8x7b.json")
LAYERS = len(MIXTRAL.layers)
EXPERTS = LAYERS * 8 * 3 * 4096 * 14336
DENSE = MIXTRAL.parameters - EXPERTS
TRAINING = Training(MIXTRAL, 8, 2048)


def plan(**fields):
    return Plan(**{"stage_layers": (LAYERS,), "data": 8, "micro_batches": 1, **fields})


def test_published_numbers_of_parameters():
    # https://arxiv.org/abs/2401.04088: 47B, of which a token uses 13B.
    assert (MIXTRAL.parameters, MIXTRAL.active_parameters) == (46_702_792_704, DENSE + EXPERTS // 4)
    assert MIXTRAL.active_parameters == 12_879_925_248


def test_only_the_experts_of_a_token_compute():
    attention = 12 * 32 * 128 * 1024 * LAYERS * TRAINING.tokens
    lookups = MIXTRAL.embedding_parameters
    norms = (2 * LAYERS + 1) * 4096
    matmuls = 6 * (MIXTRAL.active_parameters - lookups - norms) * TRAINING.tokens
    assert model_flops_per_step(TRAINING) == pytest.approx(matmuls + attention, rel=1e-12)


@pytest.mark.parametrize("expert", [1, 2, 8])
def test_ranks_hold_their_experts_and_everything_else(expert):
    environment = environment_of("H100 80GB", 8)
    software = environment.software
    needed = peak_memory(PlanTable.from_plans([plan(expert=expert)]), TRAINING, software)
    held = DENSE + EXPERTS / expert
    assert needed.parameters[0, 0] == pytest.approx(held * (software.weight_bytes + software.weight_copy_bytes))
    assert needed.gradients[0, 0] == pytest.approx(held * software.gradient_bytes)
    assert needed.optimizer[0, 0] == pytest.approx(held * software.optimizer_bytes)


def test_sharded_experts_take_the_same_with_any_number_of_groups():
    """8 ranks hold each parameter once in all, whether the experts are split first or not."""
    software = environment_of("H100 80GB", 8).software
    plans = [plan(expert=expert, sharding="parameters") for expert in (1, 2, 8)]
    needed = peak_memory(PlanTable.from_plans(plans), TRAINING, software)
    for part in (needed.parameters, needed.gradients, needed.optimizer):
        assert part[:, 0] == pytest.approx(part[0, 0])
    # A rank gathers two layers at a time, of which it then needs fewer experts.
    assert needed.buffers[2, 0] < needed.buffers[1, 0] < needed.buffers[0, 0]


def test_exchange_of_tokens_takes_what_the_links_give():
    environment = environment_of("H100 80GB", 8)
    device, efficiency = environment.cluster.device, environment.roofline.efficiency
    sent_bytes = 2048 * 2 * 4096 * 2 * 7 / 8
    rate = device.node_bytes_per_second * efficiency.node
    # Out and back, in the forward and in the backward pass.
    expected = 4 * LAYERS * (sent_bytes / rate + efficiency.node_hop_s) * efficiency.slowdown
    prediction = predict(plan(expert=8), TRAINING, environment)
    assert prediction.parts.expert_exchange_s == pytest.approx(expected)
    recomputed = predict(plan(expert=8, recomputation="full"), TRAINING, environment)
    assert recomputed.parts.expert_exchange_s == pytest.approx(1.5 * expected)
    assert predict(plan(), TRAINING, environment).parts.expert_exchange_s == 0


def test_exchange_over_nodes_is_bound_by_the_network():
    near = predict(plan(data=16, expert=8), Training(MIXTRAL, 16, 2048), environment_of("H100 80GB", 16))
    environment = environment_of("H100 80GB", 16)
    cluster = replace(environment.cluster, devices_per_node=4)
    far = predict(plan(data=16, expert=8), Training(MIXTRAL, 16, 2048), replace(environment, cluster=cluster))
    assert far.parts.expert_exchange_s > 3 * near.parts.expert_exchange_s


def test_parts_of_a_step_with_experts_add_up():
    training = Training(MIXTRAL, 64, 2048)
    split = Plan((8,) * 4, tensor=2, pipeline=4, data=8, expert=4, micro_batches=8, sequence_parallel=True)
    prediction = predict(split, training, environment_of("H100 80GB", 64))
    parts = prediction.parts
    assert parts.expert_exchange_s > 0
    assert sum(vars(parts).values()) == pytest.approx(prediction.step_time_s)


def test_linear_attention_costs_the_same_for_every_position():
    # Qwen3-Next: 3 of 4 layers have 32 heads with a state of 128 x 128.
    model = describe(MODELS / "qwen3_next_80b_a3b.json")
    kinds = {layer.state_elements: count for layer, count in model.layer_kinds()}
    assert kinds == {32 * 128 * 128: 36, 0: 12}
    linear_only = replace(model, layers=tuple(layer for layer in model.layers if layer.state_elements))
    short, long = (Training(linear_only, 1, length) for length in (4096, 65536))
    assert model_flops_per_step(long) == pytest.approx(16 * model_flops_per_step(short))


@pytest.mark.parametrize("family", ["zamba2", "falcon_h1", "jamba"])
def test_state_space_layers_are_refused_by_name(family):
    with pytest.raises(PlanError, match=f"model_type '{family}' has state-space layers .*not modeled: give a decoder"):
        describe_config({"model_type": family}, family)
