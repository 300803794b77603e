"""Models divided among tensor-parallel ranks compute what one process does: losses, logits and gradients of every family."""

import functools
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moreh.runtime.tensor import apply as tensor_parallel
from moreh.runtime.tensor import collectives
from moreh.runtime.tensor.apply import (
    TensorPartition,
    describe_partition,
    max_tensor_parallel,
    sequence_parallel_refusal,
    tensor_parallel_problem,
)
from moreh.runtime.tensor.rules import FAMILY_TP_BLOCKS, TP_PLAN_FAMILIES
from tests.helpers.tensor_cases import compare, gathered_parts, tensor_group
from tests.helpers.tiny_models import build, tiny_config_of
from tests.helpers.workers import WorkerError, run_on_workers

# Float64 leaves 1e-14; a sum left out, or taken twice, is off by 1e-3 and more.
TOLERANCE = 1e-10

HEADS = {"num_key_value_heads": 4, "num_hidden_layers": 2}
OLD_FALCON = {"multi_query": False, "bias": True}
CHANGES = {
    "codegen": [{"num_attention_heads": 16, "hidden_size": 96, "rotary_dim": 4}],
    "cohere": [HEADS, HEADS | {"use_qk_norm": True}],
    "falcon": [
        {"new_decoder_architecture": True, "num_kv_heads": 4},
        OLD_FALCON | {"alibi": True, "parallel_attn": False},
        OLD_FALCON | {"alibi": True, "attn_implementation": "eager"},
    ],
    "gemma2": [HEADS | {"query_pre_attn_scalar": 12}],
    "gpt2": [{}, {"attn_implementation": "eager", "tie_word_embeddings": False}],
    "gpt_neo": [{"attention_types": [[["global", "local"], 1]], "num_hidden_layers": 2}],
    "gptj": [{"rotary_dim": 8}],
    "helium": [HEADS | {"head_dim": 12}],
    "hunyuan_v1_dense": [HEADS | {"head_dim": 12}],
    "llama": [HEADS, HEADS | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}],
    "ministral": [HEADS | {"head_dim": 12}],
    "olmo": [HEADS | {"clip_qkv": 0.3}],
    "opt": [{"word_embed_proj_dim": 32}, {"do_layer_norm_before": False}],
    "phi": [HEADS | {"qk_layernorm": True}],
    "qwen3": [HEADS | {"head_dim": 16}],
    "stablelm": [HEADS | {"partial_rotary_factor": 0.5}],
}


@pytest.mark.parametrize("tokens", [1, 3])
def test_parts_are_gathered_into_a_contiguous_tensor(tokens):
    """GPT-2's matrices take no other."""
    (found,) = run_on_workers(gathered_parts, [(tokens,)])
    assert found == [(True, [0.0] * tokens + [1.0] * tokens)] * 2


def worst(results):
    """The largest of all ranks' differences, by what was compared."""
    return {name: max(result[name] for result in results) for name in results[0]}


def wrong(results):
    return {name: value for name, value in worst(results).items() if not value < TOLERANCE}


@pytest.mark.parametrize("family", sorted(TP_PLAN_FAMILIES | set(FAMILY_TP_BLOCKS)))
def test_every_family_computes_what_one_process_does(family):
    for changes in CHANGES.get(family, [HEADS]):
        for results in run_on_workers(compare, [(family, changes, 2, False), (family, changes, 4, True)], size=4):
            assert len(results[0]) > 10
            assert wrong(results) == {}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sizes_modes_and_vocabularies_that_do_not_divide_evenly(family):
    # Nine rows on four ranks are 3, 3, 3 and none.
    changes = HEADS | {"vocab_size": 9}
    cases = [(family, changes, size, sequence) for size in (2, 4) for sequence in (False, True)]
    cases += [(family, HEADS, 2, True), (family, HEADS, 4, False)]
    for results in run_on_workers(compare, cases, size=4):
        assert wrong(results) == {}


def test_uneven_inner_features_and_a_padding_token_without_gradient():
    changes = HEADS | {"intermediate_size": 5, "pad_token_id": 93, "tie_word_embeddings": True}
    for results in run_on_workers(compare, [("llama", changes, 4, False), ("llama", changes, 4, True)], size=4):
        assert wrong(results) == {}


# What is broken, the mode that it is broken in, and what differs then.
BREAKAGES = {
    "no sum of gradients at a region's input": (False, "model.layers.0.input_layernorm.weight"),
    "gradients of partial results summed": (False, "model.layers.0.self_attn.q_proj.weight"),
    "bias added on every rank": (False, "loss"),
    "partial gradients not summed": (True, "model.layers.1.input_layernorm.weight"),
    "gradients of gathered sequences not summed": (True, "model.layers.0.input_layernorm.weight"),
    "losses over the rank's own vocabulary": (False, "loss"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_the_comparison_finds_what_is_broken(breakage):
    sequence_parallel, affected = BREAKAGES[breakage]
    (results,) = run_on_workers(compare_broken, [(breakage, sequence_parallel)], size=4)
    assert worst(results)[affected] > 1e-3


def sum_with_bias(group, row, tensor):
    return collectives.reduce_from_tp(torch.nn.functional.linear(tensor, row.weight, row.bias), group)


def compare_broken(breakage, sequence_parallel):
    """The comparison with something left out of tensor parallelism."""
    patches = {
        "no sum of gradients at a region's input": lambda: mock.patch.object(
            collectives._CopyToTP, "backward", staticmethod(lambda ctx, gradient: (gradient, None))
        ),
        "gradients of partial results summed": lambda: mock.patch.object(
            collectives._ReduceFromTP,
            "backward",
            staticmethod(lambda ctx, gradient: (collectives._all_reduce(gradient, tensor_group(2)), None)),
        ),
        "bias added on every rank": lambda: mock.patch.object(
            tensor_parallel,
            "_row_forward",
            lambda state, *args, **kwargs: functools.partial(sum_with_bias, state.group),
        ),
        "partial gradients not summed": lambda: mock.patch(
            "tests.helpers.tensor_cases.describe_partition",
            lambda *args, **kwargs: TensorPartition(describe_partition(*args, **kwargs).divisions, frozenset()),
        ),
        "gradients of gathered sequences not summed": lambda: mock.patch.object(
            collectives._GatherFromSP,
            "backward",
            staticmethod(lambda ctx, gradient: (collectives._part(gradient, ctx.dim, ctx.group), None, None)),
        ),
        "losses over the rank's own vocabulary": lambda: mock.patch(
            "moreh.runtime.tensor.vocab_parallel.dist.all_reduce"
        ),
    }
    with patches[breakage]():
        return compare("llama", HEADS | {"attention_bias": True}, 2, sequence_parallel)


REFUSED = {
    "mixtral": ({}, "model_type is 'mixtral', which tensor parallelism is not known to compute right"),
    "gpt_bigcode": ({}, "model_type is 'gpt_bigcode'"),
    "falcon": (
        {},
        "FalconForCausalLM has 1 key-value heads, which 2 tensor-parallel ranks cannot divide: use a divisor of 1",
    ),
    "codegen": ({"rotary_dim": 4}, "CodeGenForCausalLM has 1 attention heads in each of its 4 groups"),
    "llama": ({"num_attention_heads": 1}, "LlamaForCausalLM has 1 attention heads, which 2 tensor-parallel ranks"),
    "stablelm": ({"qk_layernorm": True}, "layers.0.self_attn.q_layernorm.norms.0.weight"),
    "bloom": ({"slow_but_exact": True, "pretraining_tp": 2}, "slow_but_exact"),
    "gpt2": ({"add_cross_attention": True}, "crossattention.c_attn.weight is a matrix that the tensor-parallel rules"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_right_is_refused_with_the_reason(family):
    changes, reason = REFUSED[family]
    model = build(tiny_config_of(family, changes), device="meta")
    problem = tensor_parallel_problem(model, 2)
    assert reason in problem
    assert problem == sequence_parallel_refusal(model, 2)
    assert max_tensor_parallel(model) == 1


def test_layers_that_are_left_out_would_leave_sequences_whole():
    model = build(tiny_config_of("opt", {"layerdrop": 0.1}), device="meta")
    assert tensor_parallel_problem(model, 2) is None
    assert "layerdrop is 0.1" in sequence_parallel_refusal(model, 2)


def test_the_largest_size_divides_query_and_key_value_heads():
    sizes = {}
    for heads, key_value_heads in ((12, 12), (12, 4), (12, 6), (3, 3), (8, 1)):
        config = tiny_config_of(
            "llama", {"num_attention_heads": heads, "num_key_value_heads": key_value_heads, "head_dim": 8}
        )
        sizes[heads, key_value_heads] = max_tensor_parallel(build(config, device="meta"))
    assert sizes == {(12, 12): 12, (12, 4): 4, (12, 6): 6, (3, 3): 3, (8, 1): 1}


def test_division_of_gpt2_from_a_model_without_weights():
    model = build(tiny_config_of("gpt2", {"num_hidden_layers": 1}), device="meta")
    division = describe_partition(model, 2, sequence_parallel=True)
    blocks = {name: (found.dim, found.chunk_sizes) for name, found in division.divisions.items()}
    assert blocks == {
        "transformer.wte.weight": (0, (97,)),
        "transformer.h.0.attn.c_attn.weight": (1, (48, 48, 48)),
        "transformer.h.0.attn.c_attn.bias": (0, (48, 48, 48)),
        "transformer.h.0.attn.c_proj.weight": (0, (48,)),
        "transformer.h.0.mlp.c_fc.weight": (1, (80,)),
        "transformer.h.0.mlp.c_fc.bias": (0, (80,)),
        "transformer.h.0.mlp.c_proj.weight": (0, (80,)),
    }
    layer = {f"transformer.h.0.{name}" for name in ("attn.c_proj.bias", "mlp.c_proj.bias")}
    norms = {f"transformer.{name}.{key}" for name in ("h.0.ln_1", "h.0.ln_2", "ln_f") for key in ("weight", "bias")}
    assert division.partial_gradients == layer | norms
    assert describe_partition(model, 2, sequence_parallel=False).partial_gradients == frozenset()


def test_other_models_are_refused():
    with torch.device("meta"):
        encoder = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", hidden_size=32, num_attention_heads=2))
    assert "encoder" in tensor_parallel_problem(encoder, 2)


def test_a_failing_rank_is_named_with_its_traceback():
    with pytest.raises(WorkerError, match=r"(?s)rank 1 of 2.*ZeroDivisionError"):
        run_on_workers(fail_on_second_rank, [()], size=2)


def fail_on_second_rank():
    if torch.distributed.get_rank() == 1:
        raise ZeroDivisionError
    torch.distributed.barrier()
