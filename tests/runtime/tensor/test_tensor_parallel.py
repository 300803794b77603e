"""Models split over tensor-parallel ranks compute what one process does: loss, logits and gradients of every family."""

import functools
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moreh.models.families import FAMILIES, tensor_parallel_families
from moreh.runtime.tensor import apply as tensor_parallel
from moreh.runtime.tensor import collectives, experts
from moreh.runtime.tensor.partition import (
    TensorPartition,
    describe_partition,
    max_tensor_parallel,
    sequence_parallel_refusal,
    tensor_parallel_refusal,
)
from moreh.runtime.tensor.vocab_parallel import gather_logits
from tests.helpers import tensor_cases
from tests.helpers.compare import worst
from tests.helpers.models.family_settings import FAMILY_CASES, HEADS
from tests.helpers.models.tiny_models import build, require_family, tiny_config_of
from tests.helpers.tensor_cases import (
    compare_with_one_process,
    gathered_parts,
    mean_loss,
    tensor_group,
    tensor_parallel_copy,
)
from tests.helpers.workers import WorkerError, run_on_workers

# Float64 leaves 1e-14; a sum left out, or taken twice, is off by 1e-3 and more.
TOLERANCE = 1e-10


@pytest.mark.parametrize("tokens", [1, 3])
def test_parts_are_gathered_into_a_contiguous_tensor(tokens):
    """GPT-2's Conv1D takes no other."""
    (results,) = run_on_workers(gathered_parts, [(tokens,)])
    assert results == [(True, [0.0] * tokens + [1.0] * tokens)] * 2


def worst_of_ranks(results):
    """The largest of all ranks' differences, by what was compared."""
    assert all(result.keys() == results[0].keys() for result in results)
    return {name: worst(result[name] for result in results) for name in results[0]}


def wrong(results):
    """What differs by more than rounding."""
    return {name: value for name, value in worst_of_ranks(results).items() if not value < TOLERANCE}


@pytest.mark.parametrize("family", tensor_parallel_families())
def test_every_family_computes_what_one_process_does(family):
    require_family(family)
    splits_sequences = not FAMILIES[family].whole
    for changes in FAMILY_CASES[family].tensor_parallel:
        for size, sequence in ((2, False), (4, splits_sequences)):
            (results,) = run_on_workers(compare_with_one_process, [(family, changes, size, sequence)], size=size)
            assert len(results[0]) > 10
            assert wrong(results) == {}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sizes_modes_and_vocabularies_that_ranks_do_not_divide_are_right(family):
    # Nine rows on four ranks are 3, 3, 3 and none.
    changes = HEADS | {"vocab_size": 9}
    cases = [(family, changes, size, sequence) for size in (2, 4) for sequence in (False, True)]
    cases += [(family, HEADS, 2, True), (family, HEADS, 4, False)]
    for results in run_on_workers(compare_with_one_process, cases, size=4):
        assert wrong(results) == {}


def test_uneven_inner_features_and_a_padding_token_without_gradient_are_right():
    changes = HEADS | {"intermediate_size": 5, "pad_token_id": 93, "tie_word_embeddings": True}
    cases = [("llama", changes, 4, False), ("llama", changes, 4, True)]
    for results in run_on_workers(compare_with_one_process, cases, size=4):
        assert wrong(results) == {}


# What is broken, whether with sequence parallelism, and what differs then. Each NaN is one element on the last rank.
BREAKAGES = {
    "no sum of gradients at a region's input": (False, "model.layers.0.input_layernorm.weight"),
    "gradients of partial results summed": (False, "model.layers.0.self_attn.q_proj.weight"),
    "bias added on every rank": (False, "loss"),
    "partial gradients not summed": (True, "model.layers.1.input_layernorm.weight"),
    "gradients of gathered sequences not summed": (True, "model.layers.0.input_layernorm.weight"),
    "losses over the rank's own vocabulary": (False, "loss"),
    "experts not summed": (False, "loss"),
    "gradients of experts' inputs not summed": (False, "model.layers.0.mlp.gate.weight"),
    "NaN in the loss": (False, "loss"),
    "NaN in the logits": (False, "logits"),
    "NaN in a gradient": (True, "lm_head.weight"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_comparison_finds_what_is_broken(breakage):
    sequence_parallel, affected = BREAKAGES[breakage]
    (results,) = run_on_workers(compare_broken, [(breakage, sequence_parallel)], size=4)
    assert worst_of_ranks(results)[affected] > 1e-3
    assert affected in wrong(results)


def poison(tensor, group):
    """The tensor with a NaN in one element on the group's last rank."""
    if group.rank() == group.size() - 1:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = float("nan")
    return tensor


def poison_gradient(model, group, sequence_parallel):
    local, partition, state = tensor_parallel_copy(model, group, sequence_parallel)

    def hook(parameter):
        parameter.grad = poison(parameter.grad, group)

    local.lm_head.weight.register_post_accumulate_grad_hook(hook)
    return local, partition, state


def sum_with_bias(group, row, tensor):
    return collectives.reduce_from_tp(torch.nn.functional.linear(tensor, row.weight, row.bias), group)


def compare_broken(breakage, sequence_parallel):
    """The comparison with something left out of tensor parallelism."""
    patches = {
        "no sum of gradients at a region's input": lambda: mock.patch.object(
            collectives._CopyToTP, "backward", staticmethod(lambda ctx, grad_output: (grad_output, None))
        ),
        "gradients of partial results summed": lambda: mock.patch.object(
            collectives._ReduceFromTP,
            "backward",
            staticmethod(
                lambda ctx, grad_output: (collectives._all_reduce(grad_output, tensor_group(2), "twice"), None)
            ),
        ),
        "bias added on every rank": lambda: mock.patch.object(
            tensor_parallel,
            "_row_forward",
            lambda state, *args, **kwargs: functools.partial(sum_with_bias, state.group),
        ),
        "partial gradients not summed": lambda: mock.patch(
            "tests.helpers.tensor_cases.describe_partition",
            lambda *args, **kwargs: TensorPartition(describe_partition(*args, **kwargs).splits, frozenset()),
        ),
        "gradients of gathered sequences not summed": lambda: mock.patch.object(
            collectives._GatherFromSP,
            "backward",
            staticmethod(lambda ctx, grad: (collectives._local_part(grad, ctx.dim, ctx.group), None, None)),
        ),
        "losses over the rank's own vocabulary": lambda: mock.patch(
            "moreh.runtime.tensor.vocab_parallel.dist.all_reduce"
        ),
        "experts not summed": lambda: mock.patch.object(experts, "reduce_from_tp", lambda tensor, group: tensor),
        "gradients of experts' inputs not summed": lambda: mock.patch.object(
            experts, "copy_to_tp", lambda tensor, group: tensor
        ),
        "NaN in the loss": lambda: mock.patch.object(
            tensor_cases, "mean_loss", lambda *args: poison(mean_loss(*args), args[2]) if args[2:] else mean_loss(*args)
        ),
        "NaN in the logits": lambda: mock.patch.object(
            tensor_cases, "gather_logits", lambda *args: poison(gather_logits(*args), args[1])
        ),
        "NaN in a gradient": lambda: mock.patch.object(tensor_cases, "tensor_parallel_copy", poison_gradient),
    }
    changes = HEADS | {"attention_bias": True}
    family, changes = ("mixtral", FAMILY_CASES["mixtral"].training) if "experts" in breakage else ("llama", changes)
    with patches[breakage]():
        return compare_with_one_process(family, changes, 2, sequence_parallel)


REFUSED = {
    "gpt_bigcode": ({}, "model_type is 'gpt_bigcode', which tensor parallelism is not known to compute right"),
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
    refusal = tensor_parallel_refusal(model, 2)
    assert reason in refusal
    assert refusal == sequence_parallel_refusal(model, 2)
    assert max_tensor_parallel(model) == 1


def test_layerdrop_is_refused_with_sequence_parallelism_only():
    """The layer that splits the sequences might be left out."""
    model = build(tiny_config_of("opt", {"layerdrop": 0.1}), device="meta")
    assert tensor_parallel_refusal(model, 2) is None
    assert "layerdrop is 0.1" in sequence_parallel_refusal(model, 2)


def test_whole_attention_is_refused_with_sequence_parallelism_only():
    model = build(tiny_config_of("deepseek_v3", FAMILY_CASES["deepseek_v3"].training), device="meta")
    assert tensor_parallel_refusal(model, 2) is None
    assert "computes self_attn for whole sequences" in sequence_parallel_refusal(model, 2)


def test_each_rank_needs_an_expert():
    changes = HEADS | {"num_local_experts": 3, "num_experts_per_tok": 2}
    model = build(tiny_config_of("mixtral", changes), device="meta")
    assert "has 3 experts, of which 4 tensor-parallel ranks cannot each have some" in tensor_parallel_refusal(model, 4)
    assert max_tensor_parallel(model) == 2


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.experts])
def test_eager_experts_are_known_to_skip_those_of_other_ranks_or_not_to(family):
    model = build(tiny_config_of(family, FAMILY_CASES[family].training | {"experts_implementation": "eager"}))
    own = experts.experts_of(model.model.layers[-1], FAMILIES[family].experts)
    fails = pytest.raises(RuntimeError, match="Class values must be smaller than num_classes")
    with nullcontext() if experts._skips_others(own) else fails:
        own(torch.ones(1, 48), torch.tensor([[own.num_experts]]), torch.zeros(1, 1))


def test_largest_size_divides_query_and_key_value_heads():
    sizes = {}
    for heads, key_value_heads in ((12, 12), (12, 4), (12, 6), (3, 3), (8, 1)):
        config = tiny_config_of(
            "llama", {"num_attention_heads": heads, "num_key_value_heads": key_value_heads, "head_dim": 8}
        )
        sizes[heads, key_value_heads] = max_tensor_parallel(build(config, device="meta"))
    assert sizes == {(12, 12): 12, (12, 4): 4, (12, 6): 6, (3, 3): 3, (8, 1): 1}


def test_partition_of_gpt2_is_known_without_weights():
    model = build(tiny_config_of("gpt2", {"num_hidden_layers": 1}), device="meta")
    partition = describe_partition(model, 2, sequence_parallel=True)
    assert {name: (split.dim, split.chunk_sizes) for name, split in partition.splits.items()} == {
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
    assert partition.partial_gradients == layer | norms
    assert describe_partition(model, 2, sequence_parallel=False).partial_gradients == frozenset()


def test_encoders_are_refused():
    with torch.device("meta"):
        encoder = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", hidden_size=32, num_attention_heads=2))
    assert "encoder" in tensor_parallel_refusal(encoder, 2)


def test_a_failing_rank_is_named_with_its_traceback():
    with pytest.raises(WorkerError, match=r"(?s)rank 1 of 2.*ZeroDivisionError"):
        run_on_workers(fail_on_second_rank, [()], size=2)


def fail_on_second_rank():
    if torch.distributed.get_rank() == 1:
        raise ZeroDivisionError
    torch.distributed.barrier()


def test_hidden_states_given_as_keys_and_values_too_enter_a_block_as_one_tensor():
    """As in an attention that is called with `(hidden_states, hidden_states, mask, value=hidden_states)`."""
    hidden_states, mask = torch.ones(1), torch.ones(1)
    entered = []

    def enter(tensor):
        entered.append(tensor)
        return tensor + 1

    args, kwargs = tensor_parallel._on_hidden_states(enter)(
        None, (hidden_states, hidden_states, mask), {"value": hidden_states}
    )
    assert len(entered) == 1
    assert args[0] is args[1] is kwargs["value"]
    assert args[0] is not hidden_states
    assert args[2] is mask
