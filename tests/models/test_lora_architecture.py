"""The architecture with LoRA adapters from a configuration is what the model that PEFT makes says of itself."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from moreh.accelerator.devices import find_device
from moreh.errors import PlanError
from moreh.models.describe.from_config import architecture_from_config
from moreh.models.describe.from_module import describe_module
from moreh.models.describe.from_source import describe, describe_config
from moreh.models.describe.with_lora import ALL_LINEAR, Lora, with_lora
from moreh.models.families import planned_families
from moreh.planner.cost.memory.activation_memory import layer_activations
from moreh.planner.cost.prediction import model_flops_per_step, predict
from moreh.planner.hardware.cluster import cluster_for_devices
from moreh.planner.hardware.environment import make_environment
from moreh.planner.plan.notation import parse_plan
from moreh.planner.plan.plan import Training
from moreh.planner.plan.plan_table import PlanTable
from moreh.planner.software_profile import TRANSFORMERS, moreh_software
from tests.helpers.models.family_settings import FAMILY_CASES
from tests.helpers.models.tiny_models import (
    build,
    described_counts,
    differing_fields,
    first_module_list,
    module_counts,
    name_case,
    tiny_config_of,
)

CASES = [(family, FAMILY_CASES[family].architecture[-1]) for family in planned_families()]


def adapted(config, *, rank=3, targets=ALL_LINEAR, dropout=0.0, device="cpu"):
    """The model of a configuration with adapters, as PEFT makes it."""
    model = build(config, device)
    # PEFT's own "all-linear" means OPT's projections outside the layers, too.
    matrices = {
        name.rpartition(".")[2]: part
        for name, part in first_module_list(model)[0].named_modules()
        if isinstance(part, nn.Linear | Conv1D)
    }
    settings = {"r": rank, "lora_dropout": dropout, "task_type": "CAUSAL_LM"}
    settings["fan_in_fan_out"] = any(isinstance(part, Conv1D) for part in matrices.values())
    names = sorted(matrices) if targets == ALL_LINEAR else targets
    return get_peft_model(model, LoraConfig(target_modules=names, **settings))


@pytest.mark.parametrize(("family", "changes"), CASES, ids=name_case)
def test_architecture_with_adapters_is_that_of_the_built_model(family, changes):
    config = tiny_config_of(family, changes)
    model = adapted(config, device="meta")
    architecture = with_lora(architecture_from_config(config, "tiny"), Lora(3))
    assert described_counts(architecture) == module_counts(model)
    assert differing_fields(describe_module(model), architecture) == {}
    assert 0 < architecture.trainable_parameters < architecture_from_config(config, "tiny").parameters


@pytest.mark.parametrize(
    ("family", "changes", "targets", "dropout"),
    [
        ("llama", {}, ["q_proj", "v_proj"], 0.0),
        ("llama", {"tie_word_embeddings": True}, ["mlp.down_proj", "o_proj"], 0.1),
        ("gpt2", {}, ["c_proj"], 0.1),
        ("mixtral", {"num_key_value_heads": 2}, ["o_proj"], 0.0),
        ("olmo", {}, ["gate_proj"], 0.0),  # transformers builds it
    ],
)
def test_targets_and_dropout_are_those_of_the_built_model(family, changes, targets, dropout):
    config = tiny_config_of(family, changes)
    model = adapted(config, targets=targets, dropout=dropout)
    architecture = with_lora(describe_config(config, "tiny"), Lora(3, targets, dropout > 0))
    assert described_counts(architecture) == module_counts(model)
    assert differing_fields(describe_module(model), architecture) == {}
    adapters = [linear for linear in architecture.layers[0].linears if not linear.frozen]
    assert any(linear.dropped_input for linear in adapters) == (dropout > 0)


@pytest.mark.parametrize("plan", ["tp1 pp1 dp4 mb1x4", "pp4 mb2x8 recompute:full", "dp4 mb1x4 shard:parameters"])
def test_prediction_is_that_of_the_built_model_and_less_than_of_full_training(plan):
    # Large: in small matmuls, the narrow matrices of adapters cost more than the gradients that are saved.
    sizes = {"num_hidden_layers": 4, "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 4096}
    config = tiny_config_of("llama", sizes)
    plain = architecture_from_config(config, "tiny")
    environment = make_environment(cluster_for_devices(find_device("H100 80GB"), 4), moreh_software("half"))
    described = dataclasses.replace(describe_module(adapted(config, rank=16, device="meta")), name="tiny")

    def predicted(architecture):
        training = Training(architecture, 16, 4096)
        return predict(parse_plan(plan, training, 4), training, environment)

    lora, of_module, full = map(predicted, (with_lora(plain, Lora(16)), described, plain))
    assert lora == of_module
    assert lora.parts.computation_s < full.parts.computation_s
    assert lora.parts.gradients_s <= full.parts.gradients_s
    for rank, other in zip(lora.memory, full.memory, strict=True):
        assert (rank.parameters > other.parameters, rank.gradients < other.gradients) == (True, True)
        assert rank.optimizer < 0.2 * other.optimizer
        assert rank.activations > other.activations
        assert rank.total < other.total


def test_model_needs_no_flops_for_gradients_of_frozen_matrices():
    architecture = describe("configs/models/llama3_8b.json")
    full, lora = (
        model_flops_per_step(Training(model, 1, 1)) for model in (architecture, with_lora(architecture, Lora(16)))
    )
    assert 0.66 < lora / full < 0.69  # 4 / 6, and the adapters


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_of_adapters_are_those_that_autograd_keeps(dropout):
    """Measured as the difference between two ranks, in which all but the adapters cancels out."""
    config = tiny_config_of("llama", {"num_hidden_layers": 1})
    tokens = torch.arange(32).view(1, 32)

    def kept(rank):
        model = adapted(config, rank=rank, dropout=dropout)
        storages = {}
        parameters = {parameter.data_ptr() for parameter in model.parameters()}

        def pack(tensor):
            if tensor.data_ptr() not in parameters:
                storages[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=tokens, use_cache=False).logits.sum()
            return sum(size for size, _ in storages.values())

    def predicted(rank):
        training = Training(with_lora(architecture_from_config(config, "tiny"), Lora(rank, dropout=dropout > 0)), 1, 32)
        plans = PlanTable.from_plans([parse_plan("tp1 pp1 dp1 mb1x1", training, 1)])
        return layer_activations(plans, training, TRANSFORMERS).kept[0]

    assert kept(7) - kept(3) == predicted(7) - predicted(3) == 7 * 4 * 4 * 32


def test_unknown_target_is_refused_and_the_matrices_are_named():
    architecture = describe("configs/models/llama3_8b.json")
    message = (
        "'query', 'proj' is not a matrix of the model's layers: give all-linear, or some of down_proj, gate_proj, "
    )
    with pytest.raises(PlanError, match=message):
        with_lora(architecture, Lora(8, ["q_proj", "query", "proj"]))
