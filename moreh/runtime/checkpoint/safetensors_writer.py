"""Writes safetensors files one tensor at a time; the library's own writer needs a whole file in memory.

The format: 8 bytes with the length of the header, the header as JSON, then the elements of all tensors.
https://huggingface.co/docs/safetensors
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

# The format's names of dtypes. The library sorts the tensors of a file by dtype, the last ones here first.
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}


@dataclass(frozen=True)
class TensorKind:
    """Shape and dtype of a tensor in a file."""

    shape: tuple[int, ...]
    """The shape."""
    dtype: torch.dtype
    """The dtype."""

    @property
    def bytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def _header(tensors: Mapping[str, TensorKind], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The bytes of the file up to the elements, and the range of each tensor's bytes among the elements.

    Raises:
        ValueError: the format has no name for a dtype.
    """
    unknown = {str(kind.dtype) for kind in tensors.values() if kind.dtype not in _DTYPES}
    if unknown:
        raise ValueError(
            f"Tensors of {', '.join(sorted(unknown))} cannot be saved as safetensors; convert them before saving."
        )
    order = list(_DTYPES)
    names = sorted(tensors, key=lambda name: (-order.index(tensors[name].dtype), name.encode()))
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    ranges, position = {}, 0
    for name in names:
        kind = tensors[name]
        ranges[name] = (position, position + kind.bytes)
        position += kind.bytes
        entries[name] = {"dtype": _DTYPES[kind.dtype], "shape": list(kind.shape), "data_offsets": list(ranges[name])}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, ranges


class SafetensorsWriter:
    """Writes a file whose tensors come one by one, in any order. The last one completes the file on the disk."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorKind], metadata: Mapping[str, str]) -> None:
        """Write the header.

        Args:
            path: the file.
            tensors: all tensors that the file is to have, by name.
            metadata: the metadata of the header, such as `{"format": "pt"}`.

        Raises:
            ValueError: the format has no name for a dtype.
        """
        header, self._ranges = _header(tensors, metadata)
        self._path, self._tensors, self._data_start = path, tensors, len(header)
        self._missing = set(tensors)
        self._file = path.open("wb")
        self._file.write(header)
        self._file.truncate(self._data_start + sum(kind.bytes for kind in tensors.values()))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor's elements to their place.

        Raises:
            ValueError: the tensor has another shape or dtype than announced, or was written before.
        """
        kind = TensorKind(tuple(tensor.shape), tensor.dtype)
        if name not in self._missing or kind != self._tensors[name]:
            raise ValueError(
                f"{self._path.name}: {name} was given as {kind}, but has to be written once, as "
                f"{self._tensors.get(name)}."
            )
        self._file.seek(self._data_start + self._ranges[name][0])
        elements = tensor.detach().cpu().contiguous().reshape(-1)
        # numpy has no bfloat16.
        self._file.write(elements.view(torch.uint8).numpy().data)
        self._missing.remove(name)
        if not self._missing:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def close(self) -> None:
        """Close a file that is not complete. Does nothing to a complete one."""
        self._file.close()
