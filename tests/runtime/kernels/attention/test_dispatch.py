"""Which attention layers compute in blocks, when, and what a script sees of it."""

import copy
import json
import pickle
import threading
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gptj import modeling_gptj

from moreh.models.families import packable_families
from moreh.options import DEFAULT_OPTIONS, ParallelOptions
from moreh.runtime.kernels.attention import causal, dispatch
from moreh.runtime.kernels.attention.dispatch import NAME, attention_layers, use_block_attention
from moreh.runtime.kernels.faster_kernels import FasterKernels
from moreh.runtime.kernels.recomputation import recompute_activations
from tests.helpers.compare import worst_of_names
from tests.helpers.models.families import make_model

IDS = torch.arange(20).view(2, 10) + 4


def tiny(family="llama", **settings):
    return make_model(family, **settings)


def bound(model, options=DEFAULT_OPTIONS):
    """Within it the model computes with our kernels."""
    return FasterKernels(model, options).bound()


def names(model):
    """The attention implementations that the layers of a model see."""
    return [layer.config._attn_implementation for layer in attention_layers(model)]


@pytest.fixture
def calls(monkeypatch):
    """The calls of block attention."""
    seen, causal_attention = [], causal.causal_attention
    monkeypatch.setattr(causal, "causal_attention", lambda *args: seen.append(args) or causal_attention(*args))
    return seen


def call_layer(name, **changes):
    """The output of an attention function of transformers, of this name."""
    torch.manual_seed(0)
    shapes = [(2, 20, heads, 16) for heads in (4, 2, 2)]
    query, key, value = (torch.randn(shape, dtype=torch.float64).transpose(1, 2) for shape in shapes)
    arguments = {"attention_mask": None, "dropout": 0.0, "scaling": None, "is_causal": True} | changes
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    return ALL_ATTENTION_FUNCTIONS[name](module, query, key, value, **arguments)[0]


@pytest.mark.parametrize(
    ("changes", "in_blocks"),
    [
        ({}, True),
        ({"sliding_window": 20}, True),
        ({"sliding_window": 19}, False),
        ({"attention_mask": torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()}, False),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 20])}, True),
        ({"dropout": 0.5}, False),
        ({"max_length_q": causal.MAX_SEQUENCE_LENGTH + 1}, False),
        ({"is_causal": False}, False),
        ({"position_bias": torch.zeros(2, 4, 20, 20, dtype=torch.float64)}, False),
    ],
)
def test_computes_in_blocks_only_where_torch_computes_the_same(calls, changes, in_blocks):
    torch.testing.assert_close(call_layer(NAME, **changes), call_layer("sdpa", **changes), rtol=1e-9, atol=1e-9)
    assert len(calls) == in_blocks


# GPT-J looks its attention up since transformers 5.24.
OLDER_GPTJ = set() if hasattr(modeling_gptj, "ALL_ATTENTION_FUNCTIONS") else {"gptj"}


@pytest.mark.parametrize("family", sorted(set(packable_families()) - OLDER_GPTJ))
def test_finds_the_attention_layer_of_each_layer(family):
    model = tiny(family)
    assert len(attention_layers(model)) == model.config.get_text_config().num_hidden_layers


@pytest.mark.parametrize("family", sorted({"falcon", "bloom"} | OLDER_GPTJ))
def test_leaves_families_that_do_not_look_their_attention_up(family):
    assert attention_layers(tiny(family)) == []


def test_leaves_a_family_with_an_attention_interface_of_its_own():
    config = AutoConfig.for_model("doge", vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    assert attention_layers(AutoModelForCausalLM.from_config(config)) == []


def test_leaves_a_layer_that_compares_its_attention_with_that_of_torch():
    from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaAttention

    layer = GlmMoeDsaAttention.__new__(GlmMoeDsaAttention)
    torch.nn.Module.__init__(layer)
    layer.config = tiny().config
    assert attention_layers(layer) == []


def test_only_the_model_that_computes_sees_the_kernel():
    model = tiny()
    sharing = type(model)(model.config)
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    seen = []
    with bound(model):
        assert names(model) == [NAME] * len(model.model.layers)
        assert set(names(sharing)) == {"sdpa"}
        assert model.config._attn_implementation == "sdpa"
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is stock
        thread = threading.Thread(target=lambda: seen.extend(names(sharing)))
        thread.start()
        thread.join()
    assert set(seen) == set(names(model)) == {"sdpa"}
    assert all(layer.config is model.config for layer in attention_layers(model))


def test_copies_and_saves_of_a_model_that_computes_have_the_config_itself(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "before")
    with bound(model, ParallelOptions(disable=("fused_norm", "fused_activation"))):
        view = model.model.layers[0].self_attn.config
        copied = copy.deepcopy(model)
        model.save_pretrained(tmp_path / "within")
        assert copy.copy(view) is model.config
        assert pickle.loads(pickle.dumps(view)).to_dict() == model.config.to_dict()
    assert all(layer.config is copied.config for layer in attention_layers(copied))
    assert set(names(copied)) == {"sdpa"}
    before, within = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("before", "within"))
    assert before == within


def test_view_gives_all_other_settings_as_they_are_now():
    model = tiny()
    with bound(model):
        model.config.initializer_range = 0.125
        assert model.model.layers[0].self_attn.config.initializer_range == 0.125


def test_script_that_has_chosen_another_attention_keeps_it():
    model = tiny()
    model.set_attn_implementation("eager")
    with bound(model):
        assert set(names(model)) == {"eager"}


def test_script_that_has_replaced_the_attention_of_torch_keeps_it(monkeypatch):
    model = tiny()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda *args, **kwargs: None)
    with bound(model):
        assert set(names(model)) == {"sdpa"}
    monkeypatch.undo()
    with bound(model):
        assert set(names(model)) == {NAME}


def test_switched_off():
    model = tiny()
    with bound(model, ParallelOptions(disable=("block_attention",))):
        assert set(names(model)) == {"sdpa"}


def test_layers_are_left_as_they_were_after_an_error():
    model = tiny()
    with pytest.raises(KeyboardInterrupt), bound(model):
        raise KeyboardInterrupt
    assert all(layer.config is model.config for layer in attention_layers(model))


def test_entered_twice():
    model = tiny()
    layers = attention_layers(model)
    with use_block_attention(layers):
        with use_block_attention(layers):
            assert set(names(model)) == {NAME}
        assert set(names(model)) == {NAME}
    assert set(names(model)) == {"sdpa"}


def loss_and_gradients(model):
    loss = model(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    results = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return results


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputation_computes_attention_again_unless_its_results_are_saved(kind):
    model = tiny()
    expected = loss_and_gradients(model)
    recompute_activations(model, kind)
    # Called once by each run of the operator's forward pass, and by nothing else.
    counted = mock.patch.object(causal, "block_query_index", wraps=causal.block_query_index)
    with bound(model, ParallelOptions(disable=("fused_norm", "fused_activation"))), counted as runs:
        actual = loss_and_gradients(model)
    assert runs.call_count == len(model.model.layers) * (2 if kind == "full" else 1)
    assert worst_of_names(actual, expected) < 1e-6


def test_shared_prefix_is_counted_from_the_second_sequence():
    cu_seqlens, cu_seqlens_k = torch.tensor([0, 9, 12, 20]), torch.tensor([0, 9, 16, 28])
    assert dispatch._shared_prefix_len(cu_seqlens, cu_seqlens_k) == 4
    assert dispatch._shared_prefix_len(cu_seqlens, None) == 0
    assert dispatch._shared_prefix_len(cu_seqlens[:2], cu_seqlens_k[:2]) == 0
