"""Makes `save_pretrained` report the weight files that it would write, instead of writing them.

A model that is sharded over ranks is saved in two steps: transformers' own `save_pretrained` decides, on tensors
without data, what the files are; then they are written tensor by tensor. The patches are in force for the first step
only.

Public ways that were tried instead. None gives the files that one worker saves, byte for byte (torch 2.13,
transformers 5.23, huggingface_hub 2.4):
- `torch.distributed.checkpoint.HuggingFaceStorageWriter` refuses tied weights, saves converted weights (merged
  experts) under the model's names instead of the checkpoint's, calls a single file `model-00001-of-00001.safetensors`
  and gives it an index, and puts entries of its own into the header (or, consolidated, drops `format` from it after
  writing everything twice). The configuration and the generation configuration would be ours to save.
- `save_pretrained(state_dict=...)` with gathered tensors, with or without
  `huggingface_hub.split_torch_state_dict_into_shards`, needs all tensors of a file in memory, which may be all of the
  model.
- `save_pretrained(distributed_checkpoint=True)` wants a model that transformers itself has sharded.
- Repeating the steps of `save_pretrained` with transformers' functions for ties and conversions is longer, and would
  have to follow every change of `save_pretrained`.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from moreh.patches.patch import Patch

SAFE_SAVE_FILE = Patch(
    target="transformers.modeling_utils.safe_save_file",
    why="While a sharded model is saved, records what weight files `save_pretrained` writes, instead of writing them.",
    no_public_way="`save_pretrained` accepts no function that writes files, and needs all tensors of a file in memory.",
    tested=("transformers 5.17", "transformers 5.23", "transformers 5.24"),
)
SPLIT_INTO_SHARDS = Patch(
    target="transformers.modeling_utils.split_torch_state_dict_into_shards",
    why="While a sharded model is saved, finds tensors without data that share memory, which go into one file.",
    no_public_way="huggingface_hub treats all tensors on the meta device as different.",
    tested=("transformers 5.17", "transformers 5.23", "transformers 5.24", "huggingface_hub 2.4"),
)


# Called with the tensors of a weight file by name, its path, and the metadata of its header.
RecordFile = Callable[[dict[str, torch.Tensor], str, dict[str, str]], None]


@contextmanager
def recording_weight_files(record: RecordFile) -> Iterator[None]:
    """A block in which `save_pretrained` of a model on the meta device calls `record` for each weight file."""
    from huggingface_hub import split_state_dict_into_shards_factory

    def save_file(tensors: dict[str, torch.Tensor], filename: str, metadata: dict[str, str]) -> None:
        record(tensors, filename, metadata)

    split = functools.partial(
        split_state_dict_into_shards_factory,
        get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
        # Storages on the meta device have no address.
        get_storage_id=lambda tensor: tensor.untyped_storage()._cdata,
    )
    with ExitStack() as stack:
        stack.enter_context(_applied(SAFE_SAVE_FILE, save_file))
        stack.enter_context(_applied(SPLIT_INTO_SHARDS, split))
        yield


@contextmanager
def _applied(patch: Patch, replacement: Callable[..., Any]) -> Iterator[None]:
    """A block in which a patch is active."""
    patch.install(lambda original: replacement)
    try:
        yield
    finally:
        patch.uninstall()
