"""Tensor parallelism in training and generation: dropout, recomputation, autocast, frozen weights, caches, adapters."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from moreh.runtime.kernels.recomputation import recompute_activations
from moreh.runtime.tensor.partition import tensor_parallel_refusal
from moreh.runtime.tensor.vocab_parallel import gather_logits
from tests.helpers.compare import relative_difference, worst, worst_of_names
from tests.helpers.float64 import exact_float64
from tests.helpers.models.tiny_models import build, tiny_config_of
from tests.helpers.tensor_cases import (
    gradient_differences,
    mean_loss,
    padded_batch,
    tensor_group,
    tensor_parallel_copy,
    whole_model,
)
from tests.helpers.workers import run_on_workers

TOLERANCE = 1e-10
DROPOUTS = {
    "gpt2": {"attn_implementation": "eager", "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "phi": {
        "attn_implementation": "eager",
        "resid_pdrop": 0.3,
        "embd_pdrop": 0.3,
        "attention_dropout": 0.3,
        "num_key_value_heads": 4,
    },
    "opt": {"attn_implementation": "eager", "dropout": 0.3, "attention_dropout": 0.3},
}
MODES = [False, True]


def _all_ranks(value, group):
    values = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def drop_and_recompute(family, sequence_parallel):
    """Which dropout masks, by their dimensions, are the same on both ranks, and whether recomputation repeats them."""
    group = tensor_group(2)
    model = whole_model(family, DROPOUTS[family])
    ids, mask, labels = padded_batch(97)
    masks, gradients = [], []
    original = torch.nn.functional.dropout

    def recording(tensor, *args, **kwargs):
        result = original(tensor, *args, **kwargs)
        masks[-1].append((tensor.dim(), (result == 0).detach().flatten()))
        return result

    states = []
    for recompute in (False, True):
        local, _, _ = tensor_parallel_copy(model, group, sequence_parallel)
        if recompute:
            local.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        masks.append([])
        with mock.patch("torch.nn.functional.dropout", recording), exact_float64():
            mean_loss(local(input_ids=ids, attention_mask=mask, use_cache=False).logits, labels, group, 97).backward()
        gradients.append({name: parameter.grad for name, parameter in local.named_parameters()})
        states.append(torch.get_rng_state())
    forward, recomputed = masks
    first, second = _all_ranks(forward, group)
    return {
        "same": [(dim, torch.equal(mine, other)) for (dim, mine), (_, other) in zip(first, second, strict=True)],
        "recomputed": len(recomputed) > len(forward)
        and all(torch.equal(mine, again) for (_, mine), (_, again) in zip(forward, recomputed, strict=False)),
        "gradients": worst_of_names(gradients[1], gradients[0]),
        "states": all(torch.equal(states[0], other) for other in [states[1], *_all_ranks(states[0], group)]),
    }


@pytest.mark.parametrize("sequence_parallel", MODES)
@pytest.mark.parametrize("family", DROPOUTS)
def test_dropout_is_equal_on_ranks_where_activations_are_and_recomputed_alike(family, sequence_parallel):
    for result in run_on_workers(drop_and_recompute, [(family, sequence_parallel)], size=4)[0]:
        layers = result["same"]
        if family != "opt":
            embedding, *layers = layers
            assert embedding == (3, True)
        # Attention has masks of four dimensions, [batch, heads, queries, keys].
        assert {dim for dim, _ in layers} == ({2, 3, 4} if family == "opt" else {3, 4})
        for dim, same in layers:
            assert same == (dim < 4 and not sequence_parallel)
        assert result["recomputed"]
        assert result["gradients"] < TOLERANCE
        assert result["states"]


def recompute_selectively(family, sequence_parallel):
    """How far gradients are off with recomputation that saves matmuls, which the collectives follow."""
    group = tensor_group(2)
    whole = whole_model(family, {"num_key_value_heads": 4})
    ids, mask, labels = padded_batch(97)
    with exact_float64():
        local, partition, _ = tensor_parallel_copy(whole, group, sequence_parallel)
        recompute_activations(local, "selective")
        mean_loss(whole(input_ids=ids, attention_mask=mask).logits, labels).backward()
        mean_loss(local(input_ids=ids, attention_mask=mask, use_cache=False).logits, labels, group, 97).backward()
    return worst(gradient_differences(local, partition, whole, group).values())


@pytest.mark.parametrize("sequence_parallel", MODES)
def test_selective_recomputation_does_not_sum_twice(sequence_parallel):
    cases = [(family, sequence_parallel) for family in ("gpt2", "llama")]
    for results in run_on_workers(recompute_selectively, cases, size=4):
        assert worst(results) < TOLERANCE


def compute_in_bfloat16(family, sequence_parallel):
    """How far gradients under autocast are from those of one process under autocast, and the dtypes of the outputs."""
    group = tensor_group(2)
    whole = whole_model(family, {"num_key_value_heads": 4}).float()
    ids, mask, labels = padded_batch(97)
    local, partition, _ = tensor_parallel_copy(whole, group, sequence_parallel)
    with torch.autocast("cpu", torch.bfloat16):
        mean_loss(whole(input_ids=ids, attention_mask=mask).logits, labels).backward()
        logits = local(input_ids=ids, attention_mask=mask).logits
        loss = mean_loss(logits, labels, group, 97)
        loss.backward()
    return gradient_differences(local, partition, whole, group), logits.dtype, loss.dtype


@pytest.mark.parametrize("family", ["bloom", "gpt2", "llama", "olmo2"])
def test_gradients_under_autocast_are_near_those_of_one_process(family):
    for results in run_on_workers(compute_in_bfloat16, [(family, mode) for mode in MODES], size=4):
        for differences, logits, loss in results:
            assert (logits, loss) == (torch.bfloat16, torch.float32)
            # Keys' biases have no gradient but rounding.
            assert worst(value for name, value in differences.items() if "k_proj.bias" not in name) < 0.15


def train_some(family, trained):
    """How far gradients are off where most parameters are frozen; the frozen ones have none."""
    group, differences = tensor_group(2), []
    for sequence_parallel in MODES:
        whole = whole_model(family, {"num_key_value_heads": 4})
        for name, parameter in whole.named_parameters():
            parameter.requires_grad_(trained in name)
        ids, mask, labels = padded_batch(97)
        with exact_float64():
            local, partition, _ = tensor_parallel_copy(whole, group, sequence_parallel)
            mean_loss(whole(input_ids=ids, attention_mask=mask).logits, labels).backward()
            mean_loss(local(input_ids=ids, attention_mask=mask).logits, labels, group, 97).backward()
        by_name = gradient_differences(local, partition, whole, group)
        assert by_name
        assert all(trained in name for name in by_name)
        differences += by_name.values()
    return worst(differences)


def test_only_trainable_parameters_get_gradients_and_the_right_ones():
    cases = [
        ("llama", "layers.1.mlp"),
        ("gpt2", "wte"),
        ("gpt2", "h.1.attn.c_proj.bias"),
        ("llama", "lm_head"),
        ("bloom", "ln_f"),
    ]
    for results in run_on_workers(train_some, cases, size=4):
        assert worst(results) < TOLERANCE


def continue_from_a_cache(family, changes, sequence_parallel):
    """How far logits of a token after a cached prompt of odd length are off, with this rank's heads in the cache."""
    group = tensor_group(2)
    whole = whole_model(family, changes).eval()
    ids, _, _ = padded_batch(97)
    with exact_float64(), torch.no_grad():
        local, _, state = tensor_parallel_copy(whole, group, sequence_parallel)
        state.sequence_parallel = False
        differences = []
        for mask in (None, torch.ones_like(ids[:, :7])):
            caches = {}
            for name, model in (("whole", whole), ("local", local)):
                caches[name] = model(input_ids=ids[:, :7], attention_mask=mask, use_cache=True).past_key_values
            longer = None if mask is None else torch.ones_like(ids)
            expected = whole(input_ids=ids[:, 7:], attention_mask=longer, past_key_values=caches["whole"]).logits
            actual = local(input_ids=ids[:, 7:], attention_mask=longer, past_key_values=caches["local"]).logits
            assert caches["local"].layers[0].keys.shape[1] == 2
            differences.append(relative_difference(gather_logits(actual, group, 97), expected))
    return worst(differences)


def test_generation_with_a_cache_gives_the_logits_of_one_process():
    changes = {
        "bloom": {},
        "falcon": {"multi_query": False, "alibi": True},
        "gpt2": {},
        "llama": {"num_key_value_heads": 4},
        "mpt": {},
    }
    cases = [(family, changes[family], mode) for family in changes for mode in MODES]
    for results in run_on_workers(continue_from_a_cache, cases, size=4):
        assert worst(results) < TOLERANCE


def split_backward(family, sequence_parallel):
    """How far gradients of a layer in two passes, as zero-bubble schedules compute them, are from those in one pass."""
    group = tensor_group(2)
    whole = whole_model(family, {"num_key_value_heads": 4})
    result = []
    for split in (False, True):
        local, _, _ = tensor_parallel_copy(whole, group, sequence_parallel)
        layers = local.model.layers if family == "llama" else local.transformer.h
        layer = layers[1]
        torch.manual_seed(3)
        hidden = torch.randn(2, 4 if sequence_parallel else 8, 48, dtype=torch.float64, requires_grad=True)
        arguments = {}
        if family == "llama":
            positions = torch.arange(8).unsqueeze(0)
            arguments = {"position_embeddings": local.model.rotary_emb(hidden, positions)}
        output = layer(hidden, **arguments)
        grad_output = torch.randn_like(output)
        if split:
            (grad_input,), groups = stage_backward_input([output], [grad_output], [hidden], layer.parameters())
            stage_backward_weight(layer.parameters(), groups)
        else:
            output.backward(grad_output)
            grad_input = hidden.grad
        result.append([grad_input, *(parameter.grad for parameter in layer.parameters())])
    assert not any(gradient is None for gradients in result for gradient in gradients)
    return worst(relative_difference(second, first) for first, second in zip(*result, strict=True))


def test_backward_pass_in_two_halves_gives_the_same_gradients():
    cases = [(family, mode) for family in ("gpt2", "llama") for mode in MODES]
    for results in run_on_workers(split_backward, cases, size=4):
        assert worst(results) < TOLERANCE


LORA_TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    "opt": ["q_proj", "out_proj", "fc1", "fc2"],
}


def train_adapters(family, sequence_parallel):
    """How far gradients of LoRA's matrices, and the logits, are off; nothing else has a gradient."""
    from peft import LoraConfig, get_peft_model

    group = tensor_group(2)
    settings = LoraConfig(
        r=3, target_modules=LORA_TARGETS[family], task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2"
    )
    whole = get_peft_model(whole_model(family, {"num_key_value_heads": 4}), settings).double()
    torch.manual_seed(7)
    for parameter in whole.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    ids, mask, labels = padded_batch(97)
    with exact_float64():
        local, partition, _ = tensor_parallel_copy(whole, group, sequence_parallel)
        logits = whole(input_ids=ids, attention_mask=mask).logits
        mean_loss(logits, labels).backward()
        local_logits = local(input_ids=ids, attention_mask=mask).logits
        mean_loss(local_logits, labels, group, 97).backward()
    differences = gradient_differences(local, partition, whole, group)
    assert len(differences) == 3 * 2 * len({"gpt2": range(4)}.get(family, LORA_TARGETS[family]))
    attended = mask.bool()
    gathered = gather_logits(local_logits, group, 97)
    return worst([*differences.values(), relative_difference(gathered[attended], logits[attended])])


def test_lora_adapters_are_split_like_their_matrices():
    pytest.importorskip("peft")
    cases = [(family, mode) for family in LORA_TARGETS for mode in MODES]
    for results in run_on_workers(train_adapters, cases, size=4):
        assert worst(results) < TOLERANCE


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"use_dora": True}, "are not plain LoRA"), ({"target_modules": ["embed_tokens"]}, "no plain torch.nn.Embedding")],
)
def test_dora_and_adapters_of_the_embedding_are_refused(settings, reason):
    peft = pytest.importorskip("peft")
    model = build(tiny_config_of("llama", {}), device="meta")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(**{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings)
    )
    assert reason in tensor_parallel_refusal(adapted, 2)
