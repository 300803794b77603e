"""The frozen weights of a run with adapters, which checkpoints leave out: their names, and how they are recognized."""

import zlib
from pathlib import Path
from typing import Any

from utils.config.schema import Config

# The number and size of the pieces of each weight file that are compared. Two models differ in nearly all pieces.
_PIECES, _PIECE_BYTES = 64, 1 << 16
_SUFFIXES = (".safetensors", ".bin")


def frozen_names(model: Any, config: Config) -> list[str]:
    """The names of the parameters that a checkpoint leaves out, since the run reads them from `model.pretrained`."""
    if config.model.lora is None:
        return []
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def base_fingerprint(model: Any, config: Config) -> str | None:
    """A fingerprint of the frozen weights; None without adapters.

    It is the commit of a model of the hub, else a checksum of pieces of the files in the directory.
    """
    if config.model.lora is None or config.model.pretrained is None:
        return None
    directory = Path(config.model.pretrained)
    if not directory.is_dir():
        commit = getattr(model.config, "_commit_hash", None)
        return None if commit is None else str(commit)
    checksum = 0
    for path in sorted(path for path in directory.iterdir() if path.suffix in _SUFFIXES):
        size = path.stat().st_size
        checksum = zlib.crc32(f"{path.name} {size}".encode(), checksum)
        with path.open("rb") as file:
            for piece in range(_PIECES):
                file.seek(max(size - _PIECE_BYTES, 0) * piece // (_PIECES - 1))
                checksum = zlib.crc32(file.read(_PIECE_BYTES), checksum)
    return f"{checksum:08x}"
