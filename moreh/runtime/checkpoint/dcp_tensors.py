"""Tensors as torch.distributed.checkpoint stores them: pieces in the coordinates of whole tensors, the same under any plan."""

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from moreh.runtime.sharding.mesh import Mesh
from moreh.runtime.sharding.shards import local_shards
from moreh.runtime.sharding.spec import ParamSpec


class StoredTensor:
    """What a rank holds of a tensor: views of its elements by where they begin in the whole one.

    The methods with underscores are those by which torch.distributed.checkpoint asks an object what is to be written and read.
    """

    def __init__(
        self, size: tuple[int, ...], dtype: torch.dtype, views: Mapping[tuple[int, ...], torch.Tensor]
    ) -> None:
        self._size, self.dtype, self.views = size, dtype, views

    def size(self) -> torch.Size:
        """The size of the whole tensor."""
        return torch.Size(self._size)

    def copied(self) -> "StoredTensor":
        """The same with a copy of the elements in the processor's memory, for which training may go on."""
        views = {offset: torch.empty(view.shape, dtype=view.dtype).copy_(view) for offset, view in self.views.items()}
        return StoredTensor(self._size, self.dtype, views)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offset), view.shape) for offset, view in self.views.items()]

    def __create_write_items__(self, name: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.views[tuple(index.offset or ())]


def stored_part(layout: ParamSpec, local: torch.Tensor, mesh: Mesh | None) -> StoredTensor:
    """A local tensor that is laid out as `layout` says; its dtype is its own."""
    pieces = local_shards(layout, mesh)
    views = {tuple(start for start, _ in piece.box): piece.of_local(local) for piece in pieces}
    return StoredTensor(layout.shape, local.dtype, views)


def stored_whole(tensor: torch.Tensor) -> StoredTensor:
    """A tensor that a rank holds all of."""
    return StoredTensor(tuple(tensor.shape), tensor.dtype, {(0,) * tensor.dim(): tensor})


def stored_value(value: Any, name: str) -> StoredTensor:
    """Something that torch.save can write and torch.load can read without running code, as bytes.

    Raises:
        TypeError: it has other things in it than numbers, strings, tensors and lists, tuples and dicts of them.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    elements = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
    try:
        value_of(elements)
    except Exception as error:
        raise TypeError(
            f"{name} cannot be stored: it may consist of numbers, strings, tensors, and lists, tuples and dicts of them. "
            f"Convert it first. torch.load says: {str(error).splitlines()[0]}"
        ) from error
    return stored_whole(elements)


def value_of(elements: torch.Tensor) -> Any:
    """What `stored_value` stored, from the elements of its tensor."""
    return torch.load(io.BytesIO(elements.numpy().tobytes()), weights_only=True)


class StoringPlanner(DefaultSavePlanner):
    """Lets torch.distributed.checkpoint write StoredTensors; equal pieces of several ranks are written once."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The view that is to be written."""
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class RestoringPlanner(DefaultLoadPlanner):
    """Lets torch.distributed.checkpoint read into StoredTensors, whatever pieces were written."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the tensors as they are; the default would look for tensors without data among them."""
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The view that is to be filled."""
        return self.state_dict[index.fqn].__get_tensor_shard__(index)
