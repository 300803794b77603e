"""What a script calls a model with, checked and cut into the rows of each rank and micro-batch."""

import inspect
import zlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moreh.errors import OptionError, WorkerError

IGNORED = -100
# Switched on, these ask for what exists only in pieces, on different workers.
WHOLE_MODEL_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")
_MASK, _POSITIONS = "attention_mask", "position_ids"
ONE_WORKER = "run on 1 worker for that (MOREH_WORKERS=1)"


@dataclass(frozen=True)
class ModelInputs:
    """The arguments of a call of a causal language model, by name.

    `tensors` have a row for each row of the batch; `others` are the same for all rows. `labels` `[batch, sequence]` are
    those of the next tokens, already shifted to the positions that predict them, -100 where there is none. `loss_divisor` is
    the number that the sum of the tokens' losses is divided by.
    """

    tensors: dict[str, torch.Tensor]
    others: dict[str, Any]
    labels: torch.Tensor | None
    loss_divisor: float

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self._first.shape[0]

    @property
    def sequence_length(self) -> int:
        """Tokens of a row, padding included."""
        return self._first.shape[1]

    @property
    def _first(self) -> torch.Tensor:
        return self.tensors["input_ids" if "input_ids" in self.tensors else "inputs_embeds"]


def read_inputs(causal: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelInputs:
    """The arguments by name.

    Raises:
        OptionError: an argument asks for what a divided model cannot give.
    """
    given = dict(inspect.signature(causal.forward).bind_partial(*args, **kwargs).arguments)
    given.update(given.pop("kwargs", {}))
    given = {name: value for name, value in given.items() if value is not None}
    for name in WHOLE_MODEL_OUTPUTS:
        if given.pop(name, getattr(causal.config, name, False)):
            raise OptionError(f"{name}=True: a model that is divided over workers does not give them: {ONE_WORKER}")
    if given.pop("ignore_index", IGNORED) != IGNORED:
        raise OptionError(
            f"ignore_index: the label that counts for nothing is {IGNORED}, so put it in place of the other one"
        )
    if "adapter_names" in given:
        raise OptionError(f"adapter_names: all rows of a batch are computed with the active adapters: {ONE_WORKER}")
    if "input_ids" not in given and "inputs_embeds" not in given:
        raise OptionError(f"the model was called with {', '.join(given) or 'nothing'}: give input_ids or inputs_embeds")
    given.pop("return_dict", None)
    labels, shifted = given.pop("labels", None), given.pop("shift_labels", None)
    if labels is not None and shifted is None:
        shifted = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED)
    items = given.pop("num_items_in_batch", None)
    first = given["input_ids"] if "input_ids" in given else given["inputs_embeds"]
    rows = first.shape[0]
    _settle_mask(causal, given, first)
    tensors = {
        name: value.expand(rows, *value.shape[1:]) if name == _POSITIONS else value
        for name, value in given.items()
        if isinstance(value, torch.Tensor) and value.dim() > 0 and (value.shape[0] == rows or name == _POSITIONS)
    }
    others = {name: value for name, value in given.items() if name not in tensors}
    if labels is not None and given.get("logits_to_keep"):
        raise OptionError(
            "logits_to_keep with labels: the loss needs the logits of all positions; leave one of them out"
        )
    divisor = float("nan")
    if shifted is not None:
        divisor = float((shifted != IGNORED).sum() if items is None else items)
    return ModelInputs(tensors, others, shifted, divisor)


def _settle_mask(causal: Any, given: dict[str, Any], first: torch.Tensor) -> None:
    """Give the mask a row for each row of the batch, where that says what it meant.

    transformers looks in the positions for texts that follow each other in a row, but only if there is no mask and no cache;
    here there is never a cache. A mask of ones says that there is one text.
    """
    mask, rows = given.get(_MASK), first.shape[0]
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.shape[0] not in (1, rows):
            shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise OptionError(
                f"attention_mask is {shape}: allowed is a tensor with a row for each of the {rows} of the batch"
            )
        given[_MASK] = mask.expand(rows, *mask.shape[1:])
    elif _POSITIONS in given and given.get("use_cache", getattr(causal.config.get_text_config(), "use_cache", False)):
        if causal.training and any(getattr(module, "gradient_checkpointing", False) for module in causal.modules()):
            raise OptionError(
                "position_ids without attention_mask: with activation recomputation, families take them for one text or for "
                "several; pass an attention_mask, or use_cache=False for several texts in a row"
            )
        given[_MASK] = torch.ones(first.shape[:2], dtype=torch.long, device=first.device)


def padded(inputs: ModelInputs, rows: int, sequence_multiple: int) -> ModelInputs:
    """The batch with as many rows as asked, the first one repeated without labels, and its sequences padded on the right.

    What is added has no label and is not attended to: positions before it do not see it.
    """
    extra_rows = rows - inputs.rows
    extra_tokens = -inputs.sequence_length % sequence_multiple
    if extra_rows == extra_tokens == 0:
        return inputs
    length = inputs.sequence_length
    tensors = {
        name: _grown(tensor, extra_rows, extra_tokens if tensor.dim() > 1 and tensor.shape[1] == length else 0, 0)
        for name, tensor in inputs.tensors.items()
    }
    labels = inputs.labels
    if labels is not None:
        labels = _grown(labels, extra_rows, extra_tokens, IGNORED).clone()
        labels[inputs.rows :] = IGNORED
    return ModelInputs(tensors, inputs.others, labels, inputs.loss_divisor)


def _grown(tensor: torch.Tensor, rows: int, tokens: int, fill: int) -> torch.Tensor:
    if tokens:
        shape = (tensor.shape[0], tokens, *tensor.shape[2:])
        tensor = torch.cat([tensor, tensor.new_full(shape, fill)], dim=1)
    return torch.cat([tensor, tensor[:1].expand(rows, *tensor.shape[1:])]) if rows else tensor


def slice_rows(inputs: ModelInputs, first: int, last: int, device: torch.device) -> ModelInputs:
    """The rows `first` to `last`, not included, on a device."""
    tensors = {name: tensor[first:last].to(device) for name, tensor in inputs.tensors.items()}
    labels = None if inputs.labels is None else inputs.labels[first:last].to(device)
    return ModelInputs(tensors, inputs.others, labels, inputs.loss_divisor)


def check_same_on_all_ranks(inputs: ModelInputs, device: torch.device) -> None:
    """Check that every worker was given the same batch; collective.

    Raises:
        WorkerError: they differ.
    """
    checksum = 0
    for name, tensor in sorted(
        [*inputs.tensors.items(), *([("labels", inputs.labels)] if inputs.labels is not None else [])]
    ):
        checksum = zlib.crc32(f"{name} {tuple(tensor.shape)} {_checksum(tensor)}".encode(), checksum)
    extremes = torch.tensor([checksum, -checksum], dtype=torch.int64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if int(extremes[0]) != -int(extremes[1]):
        raise WorkerError(
            "the workers were given different batches: each of them runs the whole script and must draw the same rows. "
            "Seed every generator that data passes (torch, numpy, random) with one number that does not depend on the worker, "
            "and do not divide the data by rank: the batch is divided for you"
        )


def _checksum(tensor: torch.Tensor) -> int:
    """A number that changes with any element or its place."""
    flat = tensor.detach().reshape(-1)
    if flat.dtype.is_floating_point:
        flat = flat.to(torch.float64).view(torch.int64)
    flat = flat.to(torch.int64)
    places = torch.arange(1, flat.numel() + 1, dtype=torch.int64, device=flat.device)
    return int(((flat + places) * (places * 2654435761 + 97) % 4294967291).sum())
