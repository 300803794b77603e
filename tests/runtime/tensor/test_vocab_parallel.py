"""Losses and logits of a split vocabulary are those of the whole one."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from moreh.runtime.sharding.spec import shard_range
from moreh.runtime.tensor import vocab_parallel
from moreh.runtime.tensor.vocab_parallel import gather_logits, vocab_parallel_cross_entropy
from tests.helpers.compare import max_difference, worst
from tests.helpers.workers import run_on_workers


def split_losses(vocabulary, dtype):
    """How far losses, their gradients and gathered logits are from those of the whole vocabulary in the same dtype."""
    group = dist.group.WORLD
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (4 * torch.randn(2, 5, vocabulary, generator=generator, dtype=torch.float64)).to(dtype)
    logits[0, 0, : min(3, vocabulary - 1)] = float("-inf")
    labels = torch.randint(vocabulary, (2, 5), generator=generator)
    labels[0, 0] = vocabulary - 1
    labels[1, 2:4] = -100
    weights = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    whole = logits.clone().requires_grad_()
    accurate = whole if dtype == torch.float64 else whole.float()
    expected = functional.cross_entropy(accurate.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    (expected * weights.to(expected.dtype)).sum().backward()
    start, stop = shard_range(vocabulary, group.size(), group.rank())
    # Not contiguous, as logits that were scaled in place or sliced may be.
    local = logits.movedim(-1, 0)[start:stop].movedim(0, -1).requires_grad_()
    losses = vocab_parallel_cross_entropy(local, labels, group, vocabulary)
    (losses * weights.to(losses.dtype)).sum().backward()
    alone = vocab_parallel_cross_entropy(logits, labels, None, vocabulary)
    return {
        "types": (losses.dtype, local.grad.dtype, expected.dtype),
        "losses": max_difference(losses, expected),
        "alone": max_difference(alone, expected),
        "gradients": worst((local.grad - whole.grad[..., start:stop]).double().abs().sum()),
        "gathered": torch.equal(gather_logits(local, group, vocabulary), logits),
        "ignored": losses[1, 2:4].tolist(),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_losses_of_a_split_vocabulary_are_those_of_the_whole(dtype):
    accurate = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-4, torch.bfloat16: 1e-1}[dtype]
    # 5 rows on 4 ranks are 2, 2, 1 and none.
    for results in run_on_workers(split_losses, [(size, dtype) for size in (97, 8, 5, 2)], size=4):
        for result in results:
            assert result["types"] == (accurate, dtype, accurate)
            assert result["losses"] < tolerance
            assert result["alone"] < tolerance
            assert result["gradients"] < tolerance
            assert result["gathered"]
            assert result["ignored"] == [0, 0]


def split_losses_with_nan(name):
    """`split_losses` with a NaN in one element on the last rank."""
    original = getattr(vocab_parallel, name)

    def poisoned(*args):
        out = original(*args).clone()
        if dist.get_rank() == dist.get_world_size() - 1:
            out.view(-1)[-1] = float("nan")
        return out

    with mock.patch.object(vocab_parallel, name, poisoned):
        return split_losses(97, torch.float64)


@pytest.mark.parametrize(("name", "affected"), [("_logsumexp", "losses"), ("_at_least_fp32", "gradients")])
def test_comparison_finds_a_nan_on_one_rank(name, affected):
    (results,) = run_on_workers(split_losses_with_nan, [(name,)], size=4)
    assert worst(result[affected] for result in results) == float("inf")
