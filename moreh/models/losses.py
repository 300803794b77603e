"""The losses that the runtime can compute from shards of the logits. Adding one is one function.

A causal language model of transformers computes its loss with `model.loss_function(logits, labels, vocab_size=...,
...)`. The runtime computes the same loss from one micro-batch at a time, with the vocabulary sharded over
tensor-parallel ranks, so it needs the loss as a function of single tokens, a `TokenLoss`. The loss of the batch is
the sum over all label tokens, divided by their number, or by the `num_items_in_batch` that the script passes.

transformers' own `ForCausalLMLoss` is known: the runtime computes it with `vocab_parallel_cross_entropy`. For another
loss:

    def my_loss(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):  # what transformers calls
        ...

    def my_token_loss(local_logits, labels, group, vocabulary_size):  # the same loss, token by token
        ...

    register_token_loss(my_loss, my_token_loss)
    model.loss_function = my_loss

`tests/runtime/engine/test_custom_loss.py` does so with a z-loss.
"""

from collections.abc import Callable
from typing import Any

import torch

IGNORED_LABEL = -100

TokenLoss = Callable[[torch.Tensor, torch.Tensor, Any, int], torch.Tensor]
"""The loss of each token `[...]`, in float32 at least, differentiable with respect to the logits.

Called with:
- the logits `[..., local vocabulary]` of this rank's part of the vocabulary,
- the labels `[...]`, which belong to the logits at the same positions; where they are -100 the loss has to be 0,
- the `torch.distributed.ProcessGroup` of the ranks that hold the other parts, None where this rank holds them all,
- the size of the whole vocabulary.

The ranks of the group call it together, and each must return the same losses.
"""

_token_losses: list[tuple[Callable[..., Any], TokenLoss]] = []


def register_token_loss(loss_function: Callable[..., Any], token_loss: TokenLoss) -> None:
    """Let the runtime compute a loss function of a model, such as `model.loss_function`, with a token loss.

    A later registration of the same function replaces an earlier one.
    """
    _token_losses.insert(0, (loss_function, token_loss))


def is_known_loss(loss_function: Callable[..., Any]) -> bool:
    """Whether the runtime can compute a loss function: transformers' `ForCausalLMLoss`, or one that was registered."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    return loss_function is ForCausalLMLoss or any(loss_function == known for known, _ in _token_losses)


def token_loss_of(loss_function: Callable[..., Any], cross_entropy: TokenLoss) -> TokenLoss:
    """The token loss registered for a loss function; else `cross_entropy`, which computes `ForCausalLMLoss`."""
    return next((token_loss for known, token_loss in _token_losses if loss_function == known), cross_entropy)
