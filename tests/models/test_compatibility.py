"""What one worker leaves to a model's own forward pass: whatever is more, or something else, than the mean loss over labels."""

import functools
import types
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForCausalLM
from transformers.activations import NewGELUActivation
from transformers.loss import loss_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from moreh.models.compatibility import unsupported_reason
from moreh.options import DEFAULT_OPTIONS
from moreh.runtime.engine.fast_path import FastPath
from moreh.runtime.kernels.attention import use_block_attention
from moreh.runtime.kernels.faster_kernels import FasterKernels
from tests.helpers.families import make_model
from tests.helpers.fast_path_cases import LENGTH, MAX_TOKENS, ROWS, batch, differences
from tests.helpers.float64 import exact_float64

pytestmark = pytest.mark.usefixtures("few_label_positions")

ALL = DEFAULT_OPTIONS


def llama(**settings):
    return make_model("llama", **settings)


def call(model, worker=None, **changes):
    return (worker or FastPath(ALL)).call(model, (), batch(model, **changes), MAX_TOKENS)


def test_what_is_known_is_computed_in_parts():
    """Without this the others would say nothing."""
    assert call(llama()) is not NotImplemented


SMALL = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "decoder_attention_heads": 2,
         "encoder_attention_heads": 2, "decoder_ffn_dim": 16, "encoder_ffn_dim": 16, "pad_token_id": 0,
         "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize("family", ["bart", "mbart", "pegasus", "marian", "blenderbot", "trocr"])
def test_losses_that_families_write_out_themselves(family):
    """Their labels are not shifted."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL))
    assert "has a loss of its own" in unsupported_reason(model)
    assert call(model) is NotImplemented


def test_loss_that_is_added():
    config = AutoConfig.for_model("bamba", vocab_size=64, hidden_size=32, num_hidden_layers=1, attn_layer_indices=[0],
                                  num_attention_heads=2, num_key_value_heads=2, intermediate_size=32, mamba_n_heads=4,
                                  mamba_d_head=16, mamba_d_state=8, z_loss_coefficient=0.1)  # fmt: skip
    assert "has a loss of its own" in unsupported_reason(AutoModelForCausalLM.from_config(config))


def test_encoder_and_decoder():
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

    def forward(self, **given):
        return self.module(**given)


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
    lambda model: model.register_forward_hook(lambda module, given, outputs: None),
    lambda model: model.model.layers[0].register_full_backward_hook(lambda module, given, gradients: None),
    lambda model: model.half(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_a_model(change):
    model, worker = llama(), FastPath(ALL)
    assert call(model, worker) is not NotImplemented
    # Also between two calls.
    change(model)
    assert call(model, worker) is NotImplemented


def test_batch_normalization():
    """Several workers refuse what is not known."""
    model = llama()
    assert unsupported_reason(model) is None
    put_in_batch_norm(model)
    assert "batch normalization" in unsupported_reason(model)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize(("precision", "known"), [("bf16", True), ("fp16", False)])
def test_wrapper_of_accelerate(precision, known, adapters):
    """Whose Trainer(bf16=True) it is. In float16 the loss is scaled."""
    accelerate, peft = pytest.importorskip("accelerate"), pytest.importorskip("peft")
    model = llama().float()
    given = batch(model)
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
    assert (FastPath(ALL).call(model, (), given, MAX_TOKENS) is not NotImplemented) == known


def test_wrapper_of_the_script():
    model = llama()
    assert FastPath(ALL).call(Wrapper(model).train(), (), batch(model), MAX_TOKENS) is NotImplemented


@pytest.mark.parametrize(
    "changes",
    [
        {"ignore_index": 0},
        {"adapter_names": ["a"] * ROWS},
        {"attention_mask": {"full_attention": None}},
        {"attention_mask": torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)},
    ],
    ids=["ignored label", "adapters of rows", "masks by kind", "mask of other rows"],
)
def test_calls(changes):
    model = llama()
    assert FastPath(ALL).call(model, (), {**batch(model), **changes}, MAX_TOKENS) is NotImplemented


def test_losses_that_are_scaled_for_float16():
    model = llama().float()
    with torch.autocast("cpu", dtype=torch.float16):
        assert call(model) is NotImplemented
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(model) is not NotImplemented


def test_results_in_the_places_of_parameters():
    model = llama()
    worker = FastPath(ALL)
    computed = {name: 1.0 * parameter for name, parameter in model.named_parameters()}
    with torch.nn.utils.stateless._reparametrize_module(model, computed):
        assert call(model, worker) is NotImplemented


def test_replaced_loss_of_transformers():
    with mock.patch.dict(loss_utils.LOSS_MAPPING, ForCausalLM=lambda *args, **kwargs: None):
        assert call(llama()) is NotImplemented


def test_adapters_that_do_more():
    peft = pytest.importorskip("peft")
    common = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    assert unsupported_reason(peft.get_peft_model(llama(), peft.LoraConfig(**common))) is None
    invoked = peft.LoraConfig(alora_invocation_tokens=[1], **common)
    assert "begin at certain tokens" in unsupported_reason(peft.get_peft_model(llama(), invoked))
    regularized = peft.AdaLoraConfig(total_step=10, tinit=1, tfinal=1, **common)
    assert "AdaLoraModel" in unsupported_reason(peft.get_peft_model(llama(), regularized))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "changes",
    [
        # One text with jumps; transformers looks for several texts only where there is no cache.
        {"position_ids": torch.arange(LENGTH)[None] * 2, "attention_mask": None, "use_cache": True},
        {"position_ids": torch.arange(LENGTH)[None] % 5, "attention_mask": None, "use_cache": None},
        {"position_ids": torch.arange(LENGTH)[None] % 5, "attention_mask": None, "use_cache": False},
        # A prefix that sees all of itself, the same for all rows.
        {
            "attention_mask": torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
            .tril()
            .index_fill(3, torch.arange(4), True)
        },
    ],
    ids=["positions that jump", "cache by default", "several texts", "mask of pairs"],
)
def test_what_tokens_see(family, changes):
    model = make_model(family)
    given = {name: value for name, value in batch(model, **changes).items() if value is not None}
    assert max(differences(model, given)) < 1e-9


def test_model_that_is_told_to_see_the_future():
    model = llama()
    model.config.is_causal = False
    given = batch(model)
    causal = llama()(**given).loss.item()
    assert max(differences(model, given)) < 1e-9
    assert model(**given).loss.item() != pytest.approx(causal, rel=1e-3)


def test_gradients_of_chosen_parameters():
    model = llama()
    given = batch(model)
    chosen = [model.lm_head.weight, model.model.embed_tokens.weight]
    with exact_float64():
        expected = torch.autograd.grad(model(**given).loss, chosen)
        seen = torch.autograd.grad(call(model).loss, chosen)
        call(model).loss.backward(inputs=chosen[:1])
    for one, other in zip(seen, expected, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(chosen[0].grad, expected[0])
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 1
    with pytest.raises(Exception, match="create_graph=True"):
        call(model).loss.backward(create_graph=True)


def test_script_draws_the_numbers_that_it_would_draw():
    model = llama()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    call(model).loss.backward()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("label", [-1, 10**6])
def test_labels_that_are_no_tokens(label):
    model = llama()
    given = batch(model)
    given["labels"][0, 2] = label
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        FastPath(ALL).call(model, (), given, MAX_TOKENS)


def test_logits_of_inputs_that_have_changed():
    model = llama()
    given = batch(model)
    outputs = FastPath(ALL).call(model, (), given, MAX_TOKENS)
    given["input_ids"].zero_()
    with pytest.raises(Exception, match="weights or inputs have changed"):
        _ = outputs.logits


def test_models_are_let_go_of():
    worker = FastPath(ALL)
    for _ in range(6):
        call(llama(), worker)
    assert len(worker._runners) == 4


def own_sdpa(*args, **kwargs):
    raise AssertionError


@pytest.mark.parametrize("module", [NewGELUActivation(), modeling_llama.LlamaRMSNorm(4)])
def test_functions_of_the_script_stay_in_their_places(module):
    with FasterKernels(module, ALL).bound():
        assert "forward" in module.__dict__
    early, late = FasterKernels(module, ALL), None
    with mock.patch.object(type(module), "forward", own_sdpa):
        late = FasterKernels(module, ALL)
        for kernels in (early, late):
            with kernels.bound():
                assert "forward" not in module.__dict__


def test_attention_of_the_script_stays_in_its_place():
    ALL_ATTENTION_FUNCTIONS["sdpa"] = own_sdpa
    try:
        with use_block_attention():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own_sdpa
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    with use_block_attention():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not own_sdpa


def test_attention_that_may_make_no_mask_gets_no_packed_rows():
    model = llama()
    # One that a script has registered under a name of its own.
    model.config._attn_implementation_internal = "own"
    with mock.patch.dict(ALL_ATTENTION_FUNCTIONS._global_mapping, own=ALL_ATTENTION_FUNCTIONS["sdpa"]):
        assert max(differences(model, batch(model))) < 1e-9


@pytest.mark.parametrize("decoder", [True, False])
def test_output_layer_inside_of_a_head(decoder):
    """All of its logits are computed."""
    config = AutoConfig.for_model("roberta", vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                  intermediate_size=32, max_position_embeddings=40, is_decoder=decoder, hidden_dropout_prob=0.0,
                                  attention_probs_dropout_prob=0.0)  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().train()
    assert max(differences(model, batch(model))) < 1e-9
