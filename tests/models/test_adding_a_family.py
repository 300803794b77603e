"""Adding a family takes one record and one line that registers it: shown by doing it, and by doing it wrong.

The record and the line are in tests/helpers/models/made_up_family.py. A wrong record is found by the comparisons that
every family of the registry goes through.
"""

from dataclasses import replace
from unittest import mock

import pytest

from moreh.errors import PlanError
from moreh.models.describe.from_config import architecture_from_config
from moreh.models.describe.from_module import describe_module
from moreh.models.describe.from_source import describe_config
from moreh.models.families import FAMILIES, gemma2
from moreh.models.families.tp_blocks import SEPARATE_QKV, mlp_block, split_gate_up
from moreh.runtime.batch import packing
from moreh.runtime.tensor.partition import max_tensor_parallel, tensor_parallel_refusal
from tests.helpers.compare import worst
from tests.helpers.fast_path_cases import batch, differences
from tests.helpers.models.family_settings import HEADS
from tests.helpers.models.made_up_family import MADE_UP, MODEL_TYPE, add_to_transformers, compare_registered, registered
from tests.helpers.models.tiny_models import build, described_counts, differing_fields, module_counts, tiny_config_of
from tests.helpers.tensor_cases import whole_model
from tests.helpers.workers import run_on_workers

TOLERANCE = 1e-9
CHANGES = {"num_key_value_heads": 2, "attention_bias": True}
# Its feed-forward network is split as if gate and up projection were each two parts.
WRONG_BLOCKS = replace(
    MADE_UP, tensor_parallel=(SEPARATE_QKV, mlp_block("mlp", "gate_proj up_proj", "down_proj", split_gate_up))
)
# Its layers have twice the norms that they have.
WRONG_ARCHITECTURE = replace(MADE_UP, config_keys=gemma2.FAMILY.config_keys, architecture=gemma2.FAMILY.architecture)


def test_without_a_record_little_is_known_of_a_family():
    add_to_transformers()
    model = build(tiny_config_of(MODEL_TYPE, {}), device="meta")
    assert MODEL_TYPE not in FAMILIES
    assert "which tensor parallelism is not known to compute right" in tensor_parallel_refusal(model, 2)
    with pytest.raises(PlanError, match="model_type is 'made_up': give one of "):
        architecture_from_config(tiny_config_of(MODEL_TYPE, {}), "tiny")
    with mock.patch("moreh.runtime.batch.batch_cutter.pack_micro_batches") as pack:
        model = whole_model(MODEL_TYPE, {})
        assert worst(differences(model, batch(model))) < TOLERANCE
    assert not pack.called


def test_record_plans_the_family_without_transformers():
    with registered(MADE_UP), mock.patch("moreh.models.describe.from_source._describe_built") as describe_built:
        config = tiny_config_of(MODEL_TYPE, CHANGES)
        architecture = describe_config(config, "tiny")
        model = build(config, device="meta")
    assert not describe_built.called
    assert described_counts(architecture) == module_counts(model)
    assert differing_fields(architecture, describe_module(model)) == {}
    assert architecture.family == MODEL_TYPE


def test_comparison_finds_a_wrong_architecture():
    with registered(WRONG_ARCHITECTURE):
        config = tiny_config_of(MODEL_TYPE, CHANGES)
        assert described_counts(describe_config(config, "tiny")) != module_counts(build(config, device="meta"))


def test_record_makes_the_family_tensor_parallel():
    with registered(MADE_UP):
        assert max_tensor_parallel(build(tiny_config_of(MODEL_TYPE, {}), device="meta")) == 4
    cases = [(MADE_UP, HEADS, size, sequence_parallel) for size, sequence_parallel in ((2, False), (4, True))]
    for results in run_on_workers(compare_registered, cases, size=4):
        for result in results:
            assert len(result) > 10
            assert worst(result.values()) < TOLERANCE


def test_comparison_finds_wrong_blocks():
    (results,) = run_on_workers(compare_registered, [(WRONG_BLOCKS, HEADS, 2, False)], size=4)
    assert all(result["loss"] > 1e-3 for result in results)


def test_record_packs_the_family():
    with (
        registered(MADE_UP),
        mock.patch("moreh.runtime.batch.batch_cutter.pack_micro_batches", wraps=packing.pack_micro_batches) as pack,
    ):
        model = whole_model(MODEL_TYPE, {"num_key_value_heads": 2})
        assert worst(differences(model, batch(model))) < TOLERANCE
    assert pack.called


def test_comparison_finds_a_family_that_is_not_packable():
    """Bloom's linear biases take a row for one sequence."""
    with registered(replace(FAMILIES["bloom"], packable=True)):
        model = whole_model("bloom", {})
        assert min(differences(model, batch(model))) > 1e-6
