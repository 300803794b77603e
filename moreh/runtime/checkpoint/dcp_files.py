"""The files of torch.distributed.checkpoint (DCP): written with checksums, and read without running code.

DCP's `.metadata` is a pickle, and a pickle runs what it says. The reader here makes objects of the classes of DCP's
metadata, and refuses all others. DCP itself reads the tensors with `torch.load(weights_only=True)`.
"""

import io
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from moreh.runtime.checkpoint.manifest import ChecksumFile, FileSum

# The classes that a `.metadata` file may name: plain containers, which run no code of the file.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        """One of the classes above, or a dtype."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of a checkpoint's metadata")
        return super().find_class(module, name)


class SafeReader(FileSystemReader):
    """Reads the files of a checkpoint that its manifest names."""

    def __init__(self, directory: Path, files: Mapping[str, FileSum]) -> None:
        super().__init__(directory)
        self._files = files

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The names, sizes and chunks of the tensors.

        Raises:
            FileNotFoundError: there is no such file.
            UnpicklingError: the file names something that metadata does not have.
            ValueError: the content is not that of metadata.
        """
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not _is_metadata(metadata, sum(file.bytes for file in self._files.values())):
            raise ValueError("it is not the metadata of a checkpoint")
        others = {place.relative_path for place in metadata.storage_data.values()} - set(self._files)
        if others:
            raise ValueError(f"it names the file {sorted(others)[0]}, which is none of the checkpoint's")
        return metadata


def _is_metadata(metadata: Any, total_bytes: int) -> bool:
    """True if an unpickled object has the fields of metadata, and no tensor is larger than all files together."""
    if not _has_fields(metadata, Metadata, state_dict_metadata=dict, storage_data=dict):
        return False
    return all(
        isinstance(name, str) and (isinstance(entry, BytesStorageMetadata) or _is_tensor(entry, total_bytes))
        for name, entry in metadata.state_dict_metadata.items()
    ) and all(
        _has_fields(index, MetadataIndex, fqn=str)
        and _has_fields(place, object, relative_path=str, offset=int, length=int)
        for index, place in metadata.storage_data.items()
    )


def _is_tensor(entry: Any, total_bytes: int) -> bool:
    fields = {"properties": TensorProperties, "size": torch.Size, "chunks": list}
    if not _has_fields(entry, TensorStorageMetadata, **fields):
        return False
    if not _has_fields(entry.properties, TensorProperties, dtype=torch.dtype) or min(entry.size, default=0) < 0:
        return False
    fits = entry.size.numel() * entry.properties.dtype.itemsize <= total_bytes
    return fits and all(
        _has_fields(chunk, ChunkStorageMetadata, offsets=torch.Size, sizes=torch.Size) for chunk in entry.chunks
    )


def _has_fields(value: Any, kind: type, **fields: type) -> bool:
    """True if it is of this class, and each of these attributes of its class. Unpickling sets what the file names."""
    return isinstance(value, kind) and all(isinstance(getattr(value, name, None), of) for name, of in fields.items())


class _ChecksumFileSystem(FileSystem):
    """Sums up the files that are written."""

    def __init__(self) -> None:
        self.sums: dict[str, FileSum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        file = ChecksumFile(path)
        try:
            with file:
                yield cast(io.IOBase, file)
        except Exception as error:
            if file.failure is None or error is file.failure:
                raise
            raise file.failure from error
        self.sums[Path(path).name] = file.sum

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class ChecksumWriter(FileSystemWriter):
    """Writes the files of a checkpoint, and sums up those that this rank has written."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.fs = _ChecksumFileSystem()

    @property
    def sums(self) -> dict[str, FileSum]:
        """The size and checksum of each of this rank's files, by name."""
        return cast(_ChecksumFileSystem, self.fs).sums
