"""The evaluation loss of an unsharded model: every worker computes some of the rows."""

from typing import Any

import torch
import torch.distributed as dist
from transformers.modeling_outputs import CausalLMOutputWithPast

from moreh.models.introspection import unwrapped
from moreh.models.losses import token_loss_of
from moreh.runtime.batch.loss_output import output_class_of, with_lazy_outputs
from moreh.runtime.batch.missing_cache import missing_cache
from moreh.runtime.batch.model_inputs import ModelInputs, check_same_on_all_ranks, pad_inputs, slice_rows
from moreh.runtime.engine.calls.checks import check_call
from moreh.runtime.launch.world import World
from moreh.runtime.tensor.vocab_parallel import vocab_parallel_cross_entropy
from moreh.trace import span


def evaluate_unsharded(model: Any, inputs: ModelInputs, world: World) -> Any:
    """The mean loss of a batch, without gradients: a scalar in the logits' dtype, float32 at least; collective.

    Raises:
        IndexError: an id or a label is not in the vocabulary.
        OptionError: the call hands a cache over.
        WorkerError: the workers were given different batches.
    """
    causal: Any = unwrapped(model)
    device = next(model.parameters()).device
    with span("check_inputs"):
        check_same_on_all_ranks(inputs, device)
        check_call(causal, inputs)
    with span("evaluate"):
        rows_per_rank = -(-inputs.batch_size // world.size)
        padded = pad_inputs(inputs, rows_per_rank * world.size, 1)
        own = slice_rows(padded, world.rank * rows_per_rank, (world.rank + 1) * rows_per_rank, device)
        token_loss = token_loss_of(causal.loss_function, vocab_parallel_cross_entropy)
        with torch.no_grad():
            logits = model(**own.others, **own.tensors).logits
            assert own.labels is not None
            total = token_loss(logits, own.labels, None, logits.shape[-1]).sum(dtype=torch.float64)
        with span("all_reduce_loss", total.nbytes):
            dist.all_reduce(total)
    loss = (total / inputs.loss_divisor).to(torch.promote_types(logits.dtype, torch.float32))

    output_class = output_class_of(causal)

    def compute_logits() -> CausalLMOutputWithPast:
        """The logits of all rows on every worker; collective."""
        rows = logits.new_empty(world.size * len(logits), *logits.shape[1:])
        with span("all_gather_logits", rows.nbytes):
            dist.all_gather_into_tensor(rows, logits.contiguous())
        cache = missing_cache(causal, output_class, inputs)
        return CausalLMOutputWithPast(logits=rows[: inputs.batch_size], **cache)

    return with_lazy_outputs(output_class, loss, compute_logits)
