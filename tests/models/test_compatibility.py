"""Models that compute anything but the mean loss over labels: they run their own forward pass, or are refused."""

import functools
import types
from unittest import mock

import pytest
import torch
import typing_extensions
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForCausalLM
from transformers.activations import NewGELUActivation
from transformers.loss import loss_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.nemotron import modeling_nemotron

from moreh.models.compatibility import unsupported_reason
from moreh.models.library_functions import LibraryFunctions
from moreh.options import DEFAULT_OPTIONS
from moreh.runtime.engine.fast_path import FastPath
from moreh.runtime.kernels.attention.dispatch import attention_layers, use_block_attention
from moreh.runtime.kernels.faster_kernels import FasterKernels
from tests.helpers.compare import worst
from tests.helpers.fast_path_cases import LENGTH, MAX_TOKENS, batch, differences
from tests.helpers.tensor_cases import whole_model

pytestmark = pytest.mark.usefixtures("few_label_positions")


def llama(**changes):
    return whole_model("llama", changes)


def call(model, fast_path=None, **changes):
    return (fast_path or FastPath(DEFAULT_OPTIONS)).call(model, (), batch(model, **changes), MAX_TOKENS)


def test_plain_llama_is_computed_in_parts():
    """Without this the others would say nothing."""
    assert call(llama()) is not NotImplemented


SMALL = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "decoder_attention_heads": 2,
         "encoder_attention_heads": 2, "decoder_ffn_dim": 16, "encoder_ffn_dim": 16, "pad_token_id": 0,
         "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize("family", ["bart", "mbart", "pegasus", "marian", "blenderbot", "trocr"])
def test_families_with_a_loss_of_their_own_run_their_own_forward(family):
    """Their labels are not shifted."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL))
    assert "has a loss of its own" in unsupported_reason(model)
    assert call(model) is NotImplemented


def test_added_loss_is_unsupported():
    config = AutoConfig.for_model("bamba", vocab_size=64, hidden_size=32, num_hidden_layers=1, attn_layer_indices=[0],
                                  num_attention_heads=2, num_key_value_heads=2, intermediate_size=32, mamba_n_heads=4,
                                  mamba_d_head=16, mamba_d_state=8, z_loss_coefficient=0.1)  # fmt: skip
    assert "has a loss of its own" in unsupported_reason(AutoModelForCausalLM.from_config(config))


def test_encoder_with_decoder_runs_its_own_forward():
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", **SMALL))
    assert "an encoder and a decoder" in unsupported_reason(model)
    assert call(model) is NotImplemented


class Doubled(LlamaForCausalLM):
    """A script's decorator takes the name of what it wraps."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, *args, **kwargs):
        outputs = LlamaForCausalLM.forward(self, *args, **kwargs)
        outputs.loss = 2 * outputs.loss
        return outputs


class Wrapper(nn.Module):
    """Not torch's, although what it wraps has the same name there."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


class OwnNorm(nn.LayerNorm):
    pass


def change_forward(model):
    forward = model.forward
    model.forward = types.MethodType(lambda self, *args, **kwargs: forward(*args, **kwargs), model)


def change_class(model):
    model.__class__ = Doubled


def change_loss(model):
    model.loss_function = lambda *args, **kwargs: 3 * loss_utils.ForCausalLMLoss(*args, **kwargs)


def put_in_own_module(model):
    model.model.norm = OwnNorm(model.config.hidden_size)


def put_in_batch_norm(model):
    model.model.norm = nn.BatchNorm1d(LENGTH)


def add_noise(model):
    model.get_input_embeddings().neftune_noise_alpha = 5.0


def ask_for_hidden_states(model):
    model.config.output_hidden_states = True


CHANGES = [
    change_forward,
    change_class,
    change_loss,
    put_in_own_module,
    put_in_batch_norm,
    add_noise,
    ask_for_hidden_states,
    lambda model: model.register_forward_hook(lambda module, args, outputs: None),
    lambda model: model.model.layers[0].register_full_backward_hook(lambda module, args, gradients: None),
    lambda model: model.half(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_model_changed_by_the_script_runs_its_own_forward(change):
    model, fast_path = llama(), FastPath(DEFAULT_OPTIONS)
    assert call(model, fast_path) is not NotImplemented
    # Also between two calls.
    change(model)
    assert call(model, fast_path) is NotImplemented


def put_in_running_statistics(model):
    model.model.norm = nn.InstanceNorm1d(LENGTH, track_running_stats=True)


def parametrize_by_spectral_norm(model):
    nn.utils.parametrizations.spectral_norm(model.model.layers[0].mlp.up_proj)


def hook_on_spectral_norm(model):
    nn.utils.spectral_norm(model.model.layers[0].mlp.up_proj)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put_in_batch_norm, "batch normalization"),
        (put_in_running_statistics, "running statistics"),
        (parametrize_by_spectral_norm, "spectral normalization"),
        (hook_on_spectral_norm, "spectral normalization"),
    ],
)
def test_norms_of_whole_calls_are_unsupported(change, reason):
    """Several workers refuse what is not known."""
    model, fast_path = llama(), FastPath(DEFAULT_OPTIONS)
    assert unsupported_reason(model) is None
    change(model)
    assert reason in unsupported_reason(model)
    assert call(model, fast_path) is NotImplemented


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize(("precision", "known"), [("bf16", True), ("fp16", False)])
def test_bf16_wrapper_of_accelerate_is_supported_and_fp16_is_not(precision, known, adapters):
    """Whose Trainer(bf16=True) it is. In float16 the loss is scaled."""
    accelerate, peft = pytest.importorskip("accelerate"), pytest.importorskip("peft")
    model = llama().float()
    inputs = batch(model)
    if adapters:
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    accelerator = accelerate.Accelerator(cpu=True)
    # As on machines that have it.
    accelerator.native_amp = True
    context = torch.autocast("cpu", dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])
    with mock.patch("accelerate.accelerator.get_mixed_precision_context_manager", return_value=context):
        prepared = accelerator.prepare_model(model)
    assert prepared is model
    assert "forward" in model.__dict__
    assert (FastPath(DEFAULT_OPTIONS).call(model, (), inputs, MAX_TOKENS) is not NotImplemented) == known


def test_wrapper_of_the_script_runs_its_own_forward():
    model = llama()
    assert FastPath(DEFAULT_OPTIONS).call(Wrapper(model).train(), (), batch(model), MAX_TOKENS) is NotImplemented


def test_replaced_loss_of_transformers_is_noticed():
    with mock.patch.dict(loss_utils.LOSS_MAPPING, ForCausalLM=lambda *args, **kwargs: None):
        assert call(llama()) is NotImplemented


def test_deprecated_function_of_torch_is_the_librarys_own():
    """Nemotron reaches torch.cuda.amp, whose functions are wrapped by `typing_extensions.deprecated`."""
    model = whole_model("nemotron", {"num_key_value_heads": 2})
    assert LibraryFunctions(model).replaced is None
    own = typing_extensions.deprecated("of the script")(lambda *args: args)
    with mock.patch.object(modeling_nemotron, "_cast_if_autocast_enabled", own):
        assert LibraryFunctions(model).replaced.endswith("modeling_nemotron._cast_if_autocast_enabled")


def test_only_plain_lora_is_supported():
    peft = pytest.importorskip("peft")
    common = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    assert unsupported_reason(peft.get_peft_model(llama(), peft.LoraConfig(**common))) is None
    invoked = peft.LoraConfig(alora_invocation_tokens=[1], **common)
    assert "begin at certain tokens" in unsupported_reason(peft.get_peft_model(llama(), invoked))
    regularized = peft.AdaLoraConfig(total_step=10, tinit=1, tfinal=1, **common)
    assert "AdaLoraModel" in unsupported_reason(peft.get_peft_model(llama(), regularized))


def test_model_told_to_see_the_future_gives_the_same_loss():
    model = llama()
    model.config.is_causal = False
    inputs = batch(model)
    causal = llama()(**inputs).loss.item()
    assert worst(differences(model, inputs)) < 1e-9
    assert model(**inputs).loss.item() != pytest.approx(causal, rel=1e-3)


def own_sdpa(*args, **kwargs):
    raise AssertionError


@pytest.mark.parametrize("module", [NewGELUActivation(), modeling_llama.LlamaRMSNorm(4)])
def test_functions_of_the_script_are_not_replaced_by_kernels(module):
    with FasterKernels(module, DEFAULT_OPTIONS).bound():
        assert "forward" in module.__dict__
    early, late = FasterKernels(module, DEFAULT_OPTIONS), None
    with mock.patch.object(type(module), "forward", own_sdpa):
        late = FasterKernels(module, DEFAULT_OPTIONS)
        for kernels in (early, late):
            with kernels.bound():
                assert "forward" not in module.__dict__


def test_attention_of_the_script_stays_in_its_place():
    layers = attention_layers(llama())
    ALL_ATTENTION_FUNCTIONS["sdpa"] = own_sdpa
    try:
        with use_block_attention(layers):
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own_sdpa
            assert {layer.config._attn_implementation for layer in layers} == {"sdpa"}
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    with use_block_attention(layers):
        assert {layer.config._attn_implementation for layer in layers} == {"moreh_block"}


def test_attention_of_the_script_gets_no_packed_rows():
    model = llama()
    # One that a script has registered under a name of its own.
    model.config._attn_implementation_internal = "own"
    with mock.patch.dict(ALL_ATTENTION_FUNCTIONS._global_mapping, own=ALL_ATTENTION_FUNCTIONS["sdpa"]):
        assert worst(differences(model, batch(model))) < 1e-9


@pytest.mark.parametrize("decoder", [True, False])
def test_output_layer_inside_of_a_head_computes_all_logits(decoder):
    """All of its logits are computed."""
    config = AutoConfig.for_model(
        "roberta",
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        is_decoder=decoder,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().train()
    assert worst(differences(model, batch(model))) < 1e-9
