"""The files of torch.distributed.checkpoint (DCP): written with checksums, and read without running code.

DCP's `.metadata` is a pickle, and a pickle runs what it says. The reader here makes objects of the classes of DCP's
metadata, and refuses all others. DCP itself reads the tensors with `torch.load(weights_only=True)`.
"""

import io
import os
import pickle
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata

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

    def __init__(self, directory: Path, files: Collection[str]) -> None:
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
        parts = [getattr(metadata, name, None) for name in ("state_dict_metadata", "storage_data")]
        if not isinstance(metadata, Metadata) or not all(isinstance(part, dict) for part in parts):
            raise ValueError("it is not the metadata of a checkpoint")
        others = {place.relative_path for place in metadata.storage_data.values()} - set(self._files)
        if others:
            raise ValueError(f"it names the file {sorted(map(str, others))[0]}, which is none of the checkpoint's")
        return metadata


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
