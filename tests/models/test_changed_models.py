"""What scripts do with a model between its calls, compared with plain transformers: each call notices it."""

from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import masking_utils
from transformers.loss import loss_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2

from moreh.errors import OptionError, PlanError
from moreh.models.parts import split_into_parts
from moreh.options import DEFAULT_OPTIONS
from moreh.planner.plan.plan import Plan
from moreh.runtime.engine.model_runner import ModelRunner
from moreh.runtime.sharding.placement import parameter_specs
from tests.helpers.fast_path_cases import batch
from tests.helpers.models.families import make_model
from tests.helpers.plain_comparison import compare

pytestmark = pytest.mark.usefixtures("few_label_positions")
cross_entropy, linear_forward = functional.cross_entropy, nn.Linear.forward
sdpa, attention_forward = ALL_ATTENTION_FUNCTIONS["sdpa"], modeling_llama.LlamaAttention.forward


def smoothed(logits, labels, *args, **kwargs):
    return cross_entropy(logits, labels, ignore_index=-100, label_smoothing=0.5)


def looks_at_whole_rows(self, hidden_states, *args, **kwargs):
    """As LongLoRA's attention: what a token sees depends on where it is in its row."""
    output, *others = attention_forward(self, hidden_states, *args, **kwargs)
    return output + hidden_states.mean(1, keepdim=True), *others


def rescaled_attention(module, query, *args, **kwargs):
    return sdpa(module, query * query.shape[2], *args, **kwargs)


def no_mask(*args, **kwargs):
    return None


# What a script replaces, and by what.
REPLACED = {
    "fixed_cross_entropy": (loss_utils, "fixed_cross_entropy", smoothed),
    "cross_entropy": (functional, "cross_entropy", lambda x, t, **k: cross_entropy(x, t, label_smoothing=0.5, **k)),
    "wrapped in torch.no_grad": (loss_utils, "fixed_cross_entropy", torch.enable_grad()(smoothed)),
    "create_causal_mask": (modeling_llama, "create_causal_mask", no_mask),
    "rotary embedding": (modeling_llama, "apply_rotary_pos_emb", lambda q, k, *args, **kwargs: (q, k)),
    "forward of a class": (modeling_llama.LlamaAttention, "forward", looks_at_whole_rows),
    "torch.nn.Linear": (nn.Linear, "forward", lambda self, x: linear_forward(self, x) + x.mean()),
    "torch.nn.Module": (nn.Module, "__call__", lambda self, *a, **k: nn.Module._call_impl(self, *a, **k)),
    "added to a class": (modeling_llama.LlamaMLP, "__call__", lambda self, x: self.forward(x) * x.shape[1]),
}


@pytest.mark.parametrize("name", REPLACED)
@pytest.mark.parametrize("late", [False, True], ids=["before the first call", "between calls"])
def test_replaced_functions_are_those_of_the_script(name, late):
    owner, attribute, function = REPLACED[name]

    def script(model, call):
        losses = [call(model).loss] if late else []
        with mock.patch.object(owner, attribute, function, create=True):
            losses.append(call(model).loss)
        losses.append(call(model).loss)
        sum(losses).backward()
        return torch.stack(losses)

    difference, took = compare(script)
    assert difference < 1e-9
    # Once the script has put the library's function back, it is known again.
    assert took == [*([True] if late else []), False, True]


def test_function_of_another_model_is_noticed():
    """It has the name of the one that it replaces, and comes from transformers."""
    other = modeling_qwen2.apply_rotary_pos_emb
    with mock.patch.object(modeling_llama, "apply_rotary_pos_emb", other):
        assert compare(lambda model, call: call(model).loss)[1] == [False]


def test_attention_function_registered_in_the_place_of_sdpa():
    def script(model, call):
        losses = [call(model).loss]
        ALL_ATTENTION_FUNCTIONS["sdpa"] = rescaled_attention
        try:
            losses.append(call(model).loss)
        finally:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]
        return torch.stack(losses)

    difference, took = compare(script)
    assert difference < 1e-9
    assert took == [True, False]


def test_mask_module_of_the_library_is_watched_too():
    with mock.patch.object(masking_utils, "sdpa_mask", no_mask):
        assert compare(lambda model, call: call(model).loss)[1] == [False]


def replace_inner_forward(model):
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + x.mean(1, keepdim=True)


def replace_activation(model):
    for layer in model.model.layers:
        layer.mlp.act_fn.forward = lambda x: x * x.shape[1]


def compile_layers(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")


def add_parameter(model):
    model.log_var = nn.Parameter(torch.zeros((), dtype=torch.float64))


def exchange_layer(model):
    model.model.layers[0].mlp = modeling_llama.LlamaMLP(model.config).double()


def resize(model):
    model.resize_token_embeddings(model.config.vocab_size + 5, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[-5:] = 0.01


def halve_heads(model):
    """Other shapes in the same parameters."""
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj"):
            weight = getattr(layer.mlp, name).weight
            weight.data = weight.data[:8]
        layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, :8].contiguous()


CHANGES = {replace_inner_forward: False, replace_activation: False, compile_layers: False,
           add_parameter: True, exchange_layer: True, resize: True, halve_heads: True}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_models_compute_what_they_are(change, tied):
    def script(model, call):
        first = call(model).loss
        first.backward()
        # torch's graph would keep the old shapes.
        first = first.item()
        model.zero_grad()
        torch.manual_seed(3)
        change(model)
        inputs = batch(model)
        inputs["labels"][0, 3] = model.config.vocab_size - 1
        loss = call(model, **inputs).loss
        if hasattr(model, "log_var"):
            loss = torch.exp(-model.log_var) * loss + model.log_var
        loss.backward()
        return [first, loss.item()]

    difference, took = compare(script, lambda: make_model("llama", tie_word_embeddings=tied))
    assert difference < 1e-9
    assert took == [True, CHANGES[change]]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
    ],
    ids=["token indices", "LoRA", "saved embedding", "saved head", "LoRA at both ends"],
)
def test_adapters_of_embeddings(settings, tied):
    def make():
        model = make_model("llama", tie_word_embeddings=tied)
        return get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **settings))

    def script(model, call):
        for _ in range(2):
            call(model).loss.backward()
        with torch.no_grad():
            return call(model.eval()).loss

    assert compare(script, make)[0] < 1e-9


def test_evaluation_in_inference_mode():
    def script(model, call):
        with torch.inference_mode():
            outputs = call(model, **{name: value + 0 for name, value in batch(model).items() if name != "use_cache"})
            losses = [outputs.loss.item(), outputs.logits.sum().item()]
        outputs = call(model)
        outputs.loss.backward()
        return [*losses, outputs.loss.item()]

    difference, took = compare(script, lambda: make_model("llama"))
    assert difference < 1e-9
    assert took == [True, True]


@pytest.mark.parametrize("transform", ["torch.func", "dispatch mode", "saved tensors"])
def test_calls_that_torch_transforms_or_watches_are_the_models_own(transform):
    def script(model, call):
        with ExitStack() as stack:
            if transform == "torch.func":
                model.set_attn_implementation("eager")
                values = {name: parameter.detach() for name, parameter in model.named_parameters()}

                def loss_of(values):
                    with torch.nn.utils.stateless._reparametrize_module(model, values):
                        return call(model).loss

                return torch.func.grad(loss_of)(values)["lm_head.weight"]
            if transform == "dispatch mode":
                counter = stack.enter_context(torch.utils.flop_counter.FlopCounterMode(display=False))
                call(model)
                return float(counter.get_total_flops())
            shapes = []
            stack.enter_context(
                torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.numel()) or t, lambda t: t)
            )
            call(model).loss.backward()
            return float(sum(shapes))

    difference, took = compare(script)
    assert difference < 1e-9
    assert took == [False]


def test_several_workers_refuse_a_replaced_loss():
    with (
        mock.patch.object(loss_utils, "fixed_cross_entropy", smoothed),
        pytest.raises(OptionError, match=r"loss_utils.fixed_cross_entropy has been replaced.*on 1 worker"),
    ):
        ModelRunner(make_model("llama"), Plan((2,)), DEFAULT_OPTIONS)


def test_several_workers_refuse_a_parameter_on_the_model_itself():
    model = make_model("llama")
    add_parameter(model)
    parts = split_into_parts(model)
    with pytest.raises(PlanError, match=r"the parameter log_var hangs on the model itself.*or run on 1 worker"):
        parameter_specs(parts, Plan((1, len(parts.layers) - 1), pipeline=2), {})
