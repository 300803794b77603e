"""The losses that the runtime can compute from shards of the logits.

A causal language model of transformers computes its loss with `model.loss_function(logits, labels, vocab_size=...,
...)`. The runtime computes the same loss one micro-batch at a time, with the vocabulary sharded over tensor-parallel
ranks. So it needs the loss as a function of single tokens, a `TokenLoss`. The loss of the batch is the sum over all
label tokens, divided by their number, or by the `num_items_in_batch` that the script passes. A loss with another
reduction cannot be registered.

transformers' own `ForCausalLMLoss` is known: the runtime computes it with `vocab_parallel_cross_entropy`. For another
loss:

    def my_loss(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):  # what transformers calls
        ...

    def my_token_loss(local_logits, labels, group, vocabulary_size):  # the same loss, token by token
        ...

    register_token_loss(my_loss, my_token_loss)
    model.loss_function = my_loss

docs/adding-a-loss.md shows it with a z-loss. tests/runtime/engine/test_custom_loss.py compares it with the plain loop.
"""

from collections.abc import Callable
from typing import Any

import torch

IGNORED_LABEL = -100

TokenLoss = Callable[[torch.Tensor, torch.Tensor, Any, int], torch.Tensor]
"""The loss of each token `[...]`, in float32 at least, differentiable with respect to the logits.

Called with:
- the logits `[..., local vocabulary]` of this rank's part of the vocabulary, which may be empty,
- the labels `[...]`, already shifted: each is the token to predict from the logits at its position, or -100, where the
  loss has to be 0,
- the `torch.distributed.ProcessGroup` of the ranks that share the vocabulary, None if this rank holds all of it,
- the size of the whole vocabulary.

All ranks of the group call it together. It returns the same losses on each rank, and its backward pass gives each rank
the gradient with respect to its own logits. `vocab_parallel_cross_entropy` and `vocab_parallel_logsumexp`
(moreh/runtime/tensor/vocab_parallel.py) do both. A sum over ranks needs `reduce_from_tp`
(moreh/runtime/tensor/collectives.py), whose backward pass is the identity. The backward pass of
`torch.distributed.nn.functional.all_reduce` would sum the gradients once more.
"""

_token_losses: list[tuple[Callable[..., Any], TokenLoss]] = []


def register_token_loss(loss_function: Callable[..., Any], token_loss: TokenLoss) -> None:
    """Let the runtime compute a loss function of a model, such as `model.loss_function`, with a token loss.

    A later registration of the same function replaces an earlier one.
    """
    _token_losses.insert(0, (loss_function, token_loss))


def is_known_loss(loss_function: Callable[..., Any]) -> bool:
    """True if the runtime can compute a loss function: transformers' `ForCausalLMLoss`, or one that was registered."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    return loss_function is ForCausalLMLoss or is_registered_loss(loss_function)


def is_registered_loss(loss_function: Callable[..., Any]) -> bool:
    """True if a loss function has a token loss."""
    return any(loss_function == known for known, _ in _token_losses)


def token_loss_of(loss_function: Callable[..., Any], cross_entropy: TokenLoss) -> TokenLoss:
    """The token loss registered for a loss function; else `cross_entropy`, which computes `ForCausalLMLoss`."""
    return next((token_loss for known, token_loss in _token_losses if loss_function == known), cross_entropy)
