"""Safetensors files written tensor by tensor: the library's own writer wants all tensors of a file in memory at once.

The format: 8 bytes with the length of the header, the header as JSON, the tensors' bytes one behind the other.
https://huggingface.co/docs/safetensors
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

# The format's names of dtypes, in the order in which the library arranges tensors in a file, the last ones first.
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
    """Shape and dtype of a tensor of a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """What its elements take."""
        return math.prod(self.shape) * self.dtype.itemsize


def _header(tensors: Mapping[str, TensorKind], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The file up to the tensors' bytes, and where each of them begins and ends behind it.

    Raises:
        ValueError: a dtype that the format has no name for.
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
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ranges


class SafetensorsWriter:
    """Writes a file whose tensors come one by one, in any order. With the last one the file is complete and on the disk.

    Raises:
        ValueError: a dtype that the format does not know; a tensor other than announced, or written twice.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorKind], metadata: Mapping[str, str]) -> None:
        header, self._ranges = _header(tensors, metadata)
        self._path, self._tensors, self._start = path, tensors, len(header)
        self.missing = set(tensors)
        self._file = path.open("wb")
        self._file.write(header)
        self._file.truncate(self._start + sum(kind.bytes for kind in tensors.values()))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor's elements to their place."""
        kind = TensorKind(tuple(tensor.shape), tensor.dtype)
        if name not in self.missing or kind != self._tensors[name]:
            raise ValueError(
                f"{self._path.name} awaits {self._tensors.get(name)} as {name} once, and was given {kind}."
            )
        self._file.seek(self._start + self._ranges[name][0])
        elements = tensor.detach().cpu().contiguous().reshape(-1)
        # numpy has no bfloat16.
        self._file.write(elements.view(torch.uint8).numpy().data)
        self.missing.remove(name)
        if not self.missing:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def close(self) -> None:
        """Give up a file that is not complete."""
        self._file.close()
