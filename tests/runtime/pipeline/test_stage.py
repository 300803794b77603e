"""A pipeline stage computes its own layers in the model's own forward pass, and leaves the model as it was."""

from itertools import pairwise

import pytest
import torch

from moreh.models.parts import split_into_parts
from moreh.runtime.pipeline.stage import Stage
from moreh.runtime.pipeline.stubs import EmbeddingStub, HeadStub, PassThrough, StageState
from tests.helpers.compare import relative_difference
from tests.helpers.float64 import exact_float64
from tests.helpers.tensor_cases import padded_batch, whole_model

TOLERANCE = 1e-12
MICRO_BATCH = torch.tensor([0])


def make_stages(model, *bounds, positions=None):
    """The stages of a model between neighbouring `bounds`, which all compute one padded batch."""
    parts = split_into_parts(model)
    ids, mask, _ = padded_batch(97)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    return [
        Stage(parts, first, last, lambda index: inputs, lambda outputs, index: outputs.logits, lambda index: positions)
        for first, last in pairwise(bounds)
    ]


def run(stages):
    hidden_states = None
    for stage in stages:
        hidden_states = stage(hidden_states, micro_batch=MICRO_BATCH)
    return hidden_states


def slots_of(model):
    return {name: module._modules.copy() for name, module in model.named_modules()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "nanochat"])
@pytest.mark.parametrize("bounds", [(0, 3), (0, 1, 3), (0, 1, 2, 3)], ids=str)
def test_stages_one_after_the_other_compute_the_model(family, bounds):
    model = whole_model(family, {})
    ids, mask, _ = padded_batch(97)
    with exact_float64():
        expected = model(input_ids=ids, attention_mask=mask).logits
        stages = make_stages(model, *bounds)
        assert relative_difference(run(stages), expected) < TOLERANCE
        positions = torch.tensor([1, 5, 13])
        logits = run(make_stages(model, *bounds, positions=positions))
        assert relative_difference(logits, expected.flatten(0, 1)[positions][None]) < TOLERANCE


def test_stages_have_the_parameters_of_their_parts_only():
    model = whole_model("llama", {})
    first, middle, last = (set(map(id, stage.parameters())) for stage in make_stages(model, 0, 1, 2, 3))
    assert middle == set(map(id, model.model.layers[1].parameters()))
    assert first - middle == {*map(id, model.model.layers[0].parameters()), id(model.model.embed_tokens.weight)}
    assert id(model.lm_head.weight) in last
    assert len(first | middle | last) == len(list(model.parameters())) == len(first) + len(middle) + len(last)


def test_model_is_whole_between_forward_passes():
    model = whole_model("llama", {})
    before = slots_of(model)
    first, middle = make_stages(model, 0, 1, 2)
    swapped = {}
    hook = model.model.layers[1].register_forward_pre_hook(lambda module, args: swapped.update(slots_of(model)))
    middle(first(micro_batch=MICRO_BATCH), micro_batch=MICRO_BATCH)
    hook.remove()
    assert isinstance(swapped["model"]["embed_tokens"], EmbeddingStub)
    assert isinstance(swapped["model"]["norm"], HeadStub)
    assert isinstance(swapped["model.layers"]["2"], PassThrough)
    assert slots_of(model) == before
    assert "warn_if_padding_and_no_attention_mask" not in model.model.__dict__


def test_model_is_whole_after_a_forward_pass_that_failed():
    model = whole_model("llama", {})
    before = slots_of(model)
    (stage,) = make_stages(model, 1, 2)
    with pytest.raises(RuntimeError):
        stage(torch.zeros(3, 8, 47, dtype=torch.float64), micro_batch=MICRO_BATCH)
    assert slots_of(model) == before
    assert "warn_if_padding_and_no_attention_mask" not in model.model.__dict__


def test_stage_keeps_nothing_of_a_micro_batch():
    model = whole_model("llama", {})
    first, _ = make_stages(model, 0, 1, 3)
    first(micro_batch=MICRO_BATCH)
    assert first._state.sent is None
    assert first._state.received is None


def test_embeddings_after_layers_and_norms_before_them_are_refused():
    """Their model cannot be cut into stages."""
    embedding = torch.nn.Embedding(3, 2)
    started = StageState(received=torch.zeros(1, 1, 2), layers_started=True)
    with pytest.raises(RuntimeError, match="Embedding is used after layers: its model cannot be cut into stages"):
        EmbeddingStub(embedding, started)(torch.tensor([[0]]))
    with pytest.raises(RuntimeError, match="LayerNorm is used before layers"):
        HeadStub(torch.nn.LayerNorm(2), StageState())(torch.zeros(1, 1, 2))
