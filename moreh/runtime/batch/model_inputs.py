"""The arguments of a call of the model: read, checked, padded, and sliced into rows."""

import inspect
import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from moreh.errors import OptionError, WorkerError
from moreh.models.losses import IGNORED_LABEL
from moreh.runtime.batch.host_copies import to_device
from moreh.runtime.batch.input_checks import check_tensors
from moreh.trace import span

# Arguments that ask for tensors of all layers, which exist only in parts on different ranks.
WHOLE_MODEL_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")
LOGITS_TO_KEEP = "logits_to_keep"
# The keys and values of earlier tokens; `cache` since transformers 5.24.
CACHE_ARGUMENTS = ("past_key_values", "cache")
ONE_WORKER = "run on 1 worker for that (MOREH_WORKERS=1)"
_MASK, _POSITIONS = "attention_mask", "position_ids"


@dataclass(frozen=True)
class ModelInputs:
    """The arguments of a call of a causal language model, by name, for a batch or a micro-batch."""

    tensors: dict[str, torch.Tensor]
    """The arguments with a row for each sequence of the batch, such as `input_ids` `[batch, sequence]`."""
    others: dict[str, Any]
    """The arguments that are the same for all sequences."""
    labels: torch.Tensor | None
    """The labels `[batch, sequence]`, shifted to the positions that predict them; -100 where there is no label. None
    for a call without labels."""
    loss_divisor: float
    """The sum of the tokens' losses is divided by this: the script's `num_items_in_batch`, else the number of label
    tokens in the whole batch. NaN without labels."""
    host_labels: torch.Tensor | None = None
    """The labels of a micro-batch in the CPU's memory too, where they were cut there for another device."""

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return self._tokens.shape[0]

    @property
    def sequence_length(self) -> int:
        """Tokens of a row, padding included."""
        return self._tokens.shape[1]

    @property
    def _tokens(self) -> torch.Tensor:
        """`[batch, sequence]` or `[batch, sequence, hidden]`."""
        return self.tensors["input_ids" if "input_ids" in self.tensors else "inputs_embeds"]


def read_inputs(causal: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelInputs:
    """The arguments of a call of a model of transformers, by name.

    Raises:
        OptionError: an argument asks for what a sharded model cannot give.
    """
    inputs = dict(inspect.signature(causal.forward).bind_partial(*args, **kwargs).arguments)
    inputs.update(inputs.pop("kwargs", {}))
    inputs = {name: value for name, value in inputs.items() if value is not None}
    for name in WHOLE_MODEL_OUTPUTS:
        if inputs.pop(name, getattr(causal.config, name, False)):
            raise OptionError(f"{name}=True: a model that is sharded over workers does not give them: {ONE_WORKER}")
    if (ignored := inputs.pop("ignore_index", IGNORED_LABEL)) != IGNORED_LABEL:
        raise OptionError(
            f"ignore_index={ignored}: the only label that is ignored is {IGNORED_LABEL}; replace {ignored} with it"
        )
    if inputs.get("is_causal", True) is not True:
        raise OptionError(
            "is_causal=False in a call: set model.config.is_causal before the model's first training batch, or "
            f"{ONE_WORKER}"
        )
    if "adapter_names" in inputs:
        raise OptionError(f"adapter_names: all rows of a batch are computed with the active adapters: {ONE_WORKER}")
    if "input_ids" not in inputs and "inputs_embeds" not in inputs:
        raise OptionError(
            f"the model was called with {', '.join(inputs) or 'nothing'}: give input_ids or inputs_embeds"
        )
    inputs.pop("return_dict", None)
    labels, shifted_labels = inputs.pop("labels", None), inputs.pop("shift_labels", None)
    if labels is not None and shifted_labels is None:
        shifted_labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED_LABEL)
    num_items = inputs.pop("num_items_in_batch", None)
    tokens = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
    if shifted_labels is not None and shifted_labels.shape != tokens.shape[:2]:
        raise OptionError(
            f"labels are {tuple(shifted_labels.shape)}: expected a label for each of the {tuple(tokens.shape[:2])} "
            "tokens of the batch"
        )
    if shifted_labels is not None and shifted_labels.dtype != torch.int64:
        raise OptionError(f"labels are {shifted_labels.dtype}: expected torch.int64, as labels.long() gives")
    batch_size = tokens.shape[0]
    check_tensors(causal, inputs, has_cache=not inputs.keys().isdisjoint(CACHE_ARGUMENTS))
    _normalize_mask(causal, inputs, tokens)
    tensors = {
        name: value.expand(batch_size, *value.shape[1:]) if name == _POSITIONS else value
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.dim() > 0 and (value.shape[0] == batch_size or name == _POSITIONS)
    }
    others = {name: value for name, value in inputs.items() if name not in tensors}
    if labels is not None and inputs.get(LOGITS_TO_KEEP):
        raise OptionError(
            "logits_to_keep with labels: the loss needs the logits of all positions; leave one of them out"
        )
    loss_divisor = float("nan")
    if shifted_labels is not None:
        loss_divisor = float((shifted_labels != IGNORED_LABEL).sum() if num_items is None else num_items)
    return ModelInputs(tensors, others, shifted_labels, loss_divisor)


def _normalize_mask(causal: Any, inputs: dict[str, Any], tokens: torch.Tensor) -> None:
    """Give the mask a row for each row of the batch, and add a mask where a call without one would change its meaning.

    Only without a mask and without a cache does transformers tell several sequences in a row apart, by their positions.
    The runtime never uses a cache. So where the script's call would use one, a mask of ones says that each row is one
    sequence.
    """
    mask, batch_size = inputs.get(_MASK), tokens.shape[0]
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.shape[0] not in (1, batch_size):
            shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise OptionError(
                f"attention_mask is {shape}: expected a tensor with a row for each of the {batch_size} rows of the "
                "batch, or with one row for all"
            )
        # With a cache the mask is longer: it also has the tokens of earlier calls.
        if mask.dim() == 2 and mask.shape[1] != tokens.shape[1] and not inputs.keys() & CACHE_ARGUMENTS:
            raise OptionError(
                f"attention_mask is {tuple(mask.shape)}: expected a number for each of the {tuple(tokens.shape[:2])} "
                "tokens of the batch"
            )
        inputs[_MASK] = mask.expand(batch_size, *mask.shape[1:])
    elif _POSITIONS in inputs and inputs.get("use_cache", getattr(causal.config.get_text_config(), "use_cache", False)):
        if causal.training and any(getattr(module, "gradient_checkpointing", False) for module in causal.modules()):
            raise OptionError(
                "position_ids without attention_mask: with activation recomputation, some model families take them for "
                "one sequence and others for several; pass an attention_mask, or use_cache=False for several sequences "
                "in a row"
            )
        inputs[_MASK] = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)


def kept_positions(inputs: ModelInputs) -> torch.Tensor | slice:
    """An index of the positions whose logits a call asks for: all of them, the last ones, or a list."""
    kept = inputs.others.get(LOGITS_TO_KEEP, 0)
    return kept if isinstance(kept, torch.Tensor) else slice(-kept, None)


def pad_inputs(inputs: ModelInputs, batch_size: int, sequence_multiple: int) -> ModelInputs:
    """Pad a batch to `batch_size` rows by repeating the first one, and on the right to a multiple of tokens.

    The added rows and tokens have no labels. Padding on the right changes no result, as no position before it sees it.
    """
    extra_rows = batch_size - inputs.batch_size
    extra_tokens = -inputs.sequence_length % sequence_multiple
    if extra_rows == extra_tokens == 0:
        return inputs
    length = inputs.sequence_length
    tensors = {
        name: _pad(tensor, extra_rows, extra_tokens if tensor.dim() > 1 and tensor.shape[1] == length else 0, 0)
        for name, tensor in inputs.tensors.items()
    }
    labels = inputs.labels
    if labels is not None:
        labels = _pad(labels, extra_rows, extra_tokens, IGNORED_LABEL).clone()
        labels[inputs.batch_size :] = IGNORED_LABEL
    return ModelInputs(tensors, inputs.others, labels, inputs.loss_divisor)


def _pad(tensor: torch.Tensor, extra_rows: int, extra_tokens: int, value: int) -> torch.Tensor:
    """`[batch, sequence, ...]` with more tokens of a value, then with more rows like the first."""
    if extra_tokens:
        shape = (tensor.shape[0], extra_tokens, *tensor.shape[2:])
        tensor = torch.cat([tensor, tensor.new_full(shape, value)], dim=1)
    return torch.cat([tensor, tensor[:1].expand(extra_rows, *tensor.shape[1:])]) if extra_rows else tensor


def slice_rows(inputs: ModelInputs, first: int, last: int, device: torch.device) -> ModelInputs:
    """The rows `first` to `last`, not included, on a device."""
    tensors = {name: to_device(tensor[first:last], device) for name, tensor in inputs.tensors.items()}
    labels = None if inputs.labels is None else inputs.labels[first:last]
    return with_labels_on(device, ModelInputs(tensors, inputs.others, labels, inputs.loss_divisor))


def with_labels_on(device: torch.device, inputs: ModelInputs) -> ModelInputs:
    """The inputs with their labels on a device. Labels in the CPU's memory are kept there too."""
    labels = inputs.labels
    if labels is None or labels.device == device:
        return inputs
    return replace(
        inputs, labels=to_device(labels, device), host_labels=labels if labels.device.type == "cpu" else None
    )


def check_same_on_all_ranks(inputs: ModelInputs, device: torch.device) -> None:
    """Check that every rank was given the same batch; collective.

    Raises:
        WorkerError: the batches differ.
    """
    checksum = 0
    for name, tensor in sorted(
        [*inputs.tensors.items(), *([("labels", inputs.labels)] if inputs.labels is not None else [])]
    ):
        checksum = zlib.crc32(f"{name} {tuple(tensor.shape)} {_checksum(tensor)}".encode(), checksum)
    largest_and_smallest = torch.tensor([checksum, -checksum], dtype=torch.int64, device=device)
    with span("all_reduce_batch_checksum", largest_and_smallest.nbytes):
        dist.all_reduce(largest_and_smallest, op=dist.ReduceOp.MAX)
    if int(largest_and_smallest[0]) != -int(largest_and_smallest[1]):
        raise WorkerError(
            "the workers were given different batches: each of them runs the whole script and must draw the same rows. "
            "From the line on they draw the same numbers from torch, numpy and random: call it before the data is "
            "shuffled, or seed before that, with one number for all workers. Start torchrun with PYTHONHASHSEED=0 if "
            "data passes a set, and do not split the data by rank: the batch is split for you"
        )


def _checksum(tensor: torch.Tensor) -> int:
    """A number that changes with any element or its position."""
    flat = tensor.detach().reshape(-1)
    if flat.dtype.is_floating_point:
        flat = flat.to(torch.float64).view(torch.int64)
    flat = flat.to(torch.int64)
    positions = torch.arange(1, flat.numel() + 1, dtype=torch.int64, device=flat.device)
    return int(((flat + positions) * (positions * 2654435761 + 97) % 4294967291).sum())
