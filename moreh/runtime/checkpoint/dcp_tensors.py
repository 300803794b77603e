"""Shards in the format of torch.distributed.checkpoint (DCP).

DCP stores chunks in coordinates of full tensors, so the files fit any plan. For a DTensor, DCP stores one chunk per
rank. A matrix that tensor parallelism splits in several chunks (`TPSplit`) needs more.
"""

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


class TensorChunks:
    """The chunks of a full tensor that a rank holds.

    DCP calls the methods with double underscores to learn what to write and where to read to.
    """

    def __init__(
        self, size: tuple[int, ...], dtype: torch.dtype, views: Mapping[tuple[int, ...], torch.Tensor]
    ) -> None:
        self._size = size
        self.dtype = dtype
        # The elements of each chunk, by the chunk's offset in the full tensor.
        self.views = views

    def size(self) -> torch.Size:
        """The size of the full tensor."""
        return torch.Size(self._size)

    def clone_to_cpu(self) -> "TensorChunks":
        """The same chunks with copies of their elements in CPU memory, which training does not change."""
        views = {offset: torch.empty(view.shape, dtype=view.dtype).copy_(view) for offset, view in self.views.items()}
        return TensorChunks(self._size, self.dtype, views)

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


def chunks_of_local(spec: ParamSpec, local: torch.Tensor, mesh: Mesh | None) -> TensorChunks:
    """The chunks in a local tensor that is sharded as `spec` says. The tensor's dtype may differ from the spec's."""
    views = {tuple(start for start, _ in shard.box): shard.view_of_local(local) for shard in local_shards(spec, mesh)}
    return TensorChunks(spec.shape, local.dtype, views)


def chunks_of_full(tensor: torch.Tensor) -> TensorChunks:
    """One chunk: a tensor that the rank holds whole."""
    return TensorChunks(tuple(tensor.shape), tensor.dtype, {(0,) * tensor.dim(): tensor})


def chunks_of_object(value: Any, name: str) -> TensorChunks:
    """A Python object as the bytes of torch.save.

    Raises:
        TypeError: torch.load cannot read it without running code, because it has something else in it than numbers,
            strings, tensors, and lists, tuples and dicts of them.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    elements = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
    try:
        object_of_bytes(elements)
    except Exception as error:
        raise TypeError(
            f"{name} cannot be stored: it may consist of numbers, strings, tensors, and lists, tuples and dicts of "
            f"them. Convert it first. torch.load says: {str(error).splitlines()[0]}"
        ) from error
    return chunks_of_full(elements)


def object_of_bytes(elements: torch.Tensor) -> Any:
    """The object that `chunks_of_object` stored, from the elements of its tensor."""
    return torch.load(io.BytesIO(elements.numpy().tobytes()), weights_only=True)


class ChunkSavePlanner(DefaultSavePlanner):
    """Lets DCP write TensorChunks. A chunk that several ranks hold is written once."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The view to write."""
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class ChunkLoadPlanner(DefaultLoadPlanner):
    """Lets DCP read into TensorChunks, however the tensors were cut into chunks when they were written."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the state as it is. DCP's own method looks for meta tensors in it, but TensorChunks are not tensors."""
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The view to fill."""
        return self.state_dict[index.fqn].__get_tensor_shard__(index)
