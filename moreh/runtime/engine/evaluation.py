"""The loss of a model that is still whole on every worker, whose rows the workers share."""

from typing import Any

import torch
import torch.distributed as dist

from moreh.runtime.batch.loss_output import LossOutput
from moreh.runtime.batch.model_inputs import ModelInputs, check_same_on_all_ranks, padded, slice_rows
from moreh.runtime.launch.world import World
from moreh.runtime.tensor.vocab_parallel import vocab_parallel_cross_entropy


def evaluate_unsharded(model: Any, inputs: ModelInputs, world: World) -> LossOutput:
    """The mean loss of a batch without gradients; collective.

    Raises:
        WorkerError: the workers were given different batches.
    """
    device = next(model.parameters()).device
    check_same_on_all_ranks(inputs, device)
    rows = -(-inputs.rows // world.size)
    own = slice_rows(padded(inputs, rows * world.size, 1), world.rank * rows, (world.rank + 1) * rows, device)
    with torch.no_grad():
        logits = model(**own.others, **own.tensors).logits
        assert own.labels is not None
        total = vocab_parallel_cross_entropy(logits, own.labels, None, logits.shape[-1]).sum(dtype=torch.float64)
    dist.all_reduce(total)
    return LossOutput(loss=(total / inputs.loss_divisor).to(torch.promote_types(logits.dtype, torch.float32)))
