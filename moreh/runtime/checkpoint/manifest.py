"""The manifest of a checkpoint: checksums of its files, and its metadata.

Entries of the data cache have one as well. It is JSON, is written last, and is checked before anything else is read.
CRC-32 notices files that were damaged, exchanged or cut off. It does not notice an intention: nothing that is read here
runs code, see `dcp_files`.
"""

import io
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moreh.errors import CheckpointError

MANIFEST = "manifest.json"
"""The name of the file."""
_FORMAT = 1
_CHUNK_BYTES = 2**22


@dataclass(frozen=True)
class FileSum:
    """The size and checksum that a file must have."""

    bytes: int
    """The size of the file."""
    crc32: int
    """The CRC-32 of its content."""


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint, and facts about its training."""

    files: Mapping[str, FileSum]
    """The files by their names, without the manifest itself."""
    about: Mapping[str, Any]
    """The writer's facts about the training, as JSON values."""


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest of the files in a directory."""
    files = {name: asdict(file) for name, file in manifest.files.items()}
    content = {"format": _FORMAT, "files": files, "about": dict(manifest.about)}
    (directory / MANIFEST).write_text(_rendered(content), encoding="utf-8")


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = directory / MANIFEST
    try:
        text = path.read_bytes().decode()
        content = json.loads(text)["content"]
        if _rendered(content) != text:
            raise ValueError("its checksum is another one")
        if content["format"] != _FORMAT:
            raise CheckpointError(f"{path} has format {content['format']}, and this version reads format {_FORMAT}.")
        files = {name: FileSum(file["bytes"], file["crc32"]) for name, file in content["files"].items()}
        if elsewhere := [name for name in files if ".." in Path(name).parts or Path(name).is_absolute() or not name]:
            raise ValueError(f"{elsewhere[0]!r} is not the name of a file in it")
        return Manifest(files, dict(content["about"]))
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} has no complete checkpoint of a training run: there is no {MANIFEST}. Give another directory."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}). Give an earlier checkpoint."
        ) from None


def _rendered(content: Mapping[str, Any]) -> str:
    """The text of a manifest: its content, and the checksum of the content's text. Any other text is damaged."""
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    return json.dumps({"content": content, "crc32": zlib.crc32(text.encode())}, indent=1, sort_keys=True) + "\n"


def find_damage(directory: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """The damage to a checkpoint's files, as a sentence that names one of them; None if all are intact.

    Args:
        directory: the checkpoint.
        share: of several processes that check it together, the index of this one and their number.
    """
    try:
        files = read_manifest(directory).files
    except CheckpointError as error:
        return str(error)
    first, step = share
    for name, expected in sorted(files.items())[first::step]:
        found = reason_against(directory / name, expected)
        if found is not None:
            return f"{directory / name} is damaged: {found}. Give an earlier checkpoint."
    return None


def reason_against(path: Path, expected: FileSum, *, reads: bool = True) -> str | None:
    """The damage to a file, as the end of a sentence; None if it is intact. Without `reads`, checks only its size."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected.bytes:
                return f"it has {size:,} bytes, not {expected.bytes:,} as {MANIFEST} says"
            checksum = _checksum(file) if reads else expected.crc32
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if checksum != expected.crc32:
        return f"its checksum is {checksum:08x}, not {expected.crc32:08x} as {MANIFEST} says"
    return None


def sum_of_file(path: Path) -> FileSum:
    """The size and checksum of a file as it is now.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return FileSum(os.fstat(file.fileno()).st_size, _checksum(file))


def _checksum(file: BinaryIO) -> int:
    checksum = 0
    while chunk := file.read(_CHUNK_BYTES):
        checksum = zlib.crc32(chunk, checksum)
    return checksum


class ChecksumFile(io.BufferedWriter):
    """A file that is written sequentially, and computes the checksum of its content.

    Libraries that write to a file may replace its error by one of their own that does not name the reason, so the
    error is kept.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(io.FileIO(path, "w"))
        self._checksum = self._bytes = 0
        self.failure: OSError | None = None
        """The error of the first write that failed."""

    def write(self, data: Any, /) -> int:
        """Write bytes. The checksum is computed in memory, so it also reveals damage by the disk."""
        try:
            written = super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise
        self._checksum = zlib.crc32(data, self._checksum)
        self._bytes += written
        return written

    @property
    def sum(self) -> FileSum:
        """The size and checksum of the file, once it is closed."""
        return FileSum(self._bytes, self._checksum)
