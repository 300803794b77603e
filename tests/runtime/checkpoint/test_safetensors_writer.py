"""Files that are written tensor by tensor are, byte for byte, those of the safetensors library."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from moreh.runtime.checkpoint.safetensors_writer import SafetensorsWriter, TensorKind

DTYPES = [
    *["bool", "uint8", "int8", "int16", "float16", "bfloat16", "int32", "float32", "float64", "int64", "complex64"],
    *["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"],
]
SHAPES = [(3, 5), (), (0, 4), (7,)]


def test_files_of_all_dtypes_are_those_of_the_library(tmp_path):
    torch.manual_seed(0)
    tensors = {
        f"{name} ü.{index}": (torch.randn(shape) * 9).abs().to(getattr(torch, name))
        for name in DTYPES
        for index, shape in enumerate(SHAPES)
    }
    save_file(tensors, tmp_path / "library", {"format": "pt"})
    kinds = {name: TensorKind(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    writer = SafetensorsWriter(tmp_path / "writer", kinds, {"format": "pt"})
    for name in sorted(tensors, reverse=True):
        writer.write(name, tensors[name])
    read = load_file(tmp_path / "writer")
    assert all(torch.equal(read[name].view(-1), tensor.view(-1)) for name, tensor in tensors.items())
    assert (tmp_path / "writer").read_bytes() == (tmp_path / "library").read_bytes()


def test_a_tensor_that_was_not_announced_is_refused(tmp_path):
    writer = SafetensorsWriter(tmp_path / "file", {"a": TensorKind((2,), torch.float32)}, {})
    for name, tensor in (("b", torch.zeros(2)), ("a", torch.zeros(3)), ("a", torch.zeros(2, dtype=torch.float16))):
        with pytest.raises(ValueError, match=r"file: .* was given as .*, but has to be written once, as"):
            writer.write(name, tensor)
    writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="once"):
        writer.write("a", torch.zeros(2))
