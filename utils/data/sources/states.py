"""The state of data files and packages, for the cache key."""

import hashlib
from pathlib import Path
from typing import Any

from utils.config.data_section import CHATML_NAME, DataSection
from utils.data.sources.python_sources import source_files
from utils.data.sources.table_readers import load_hub
from utils.errors import UserError

# Files up to this size are known by their content: a second for each GB. Larger ones are known by size and times.
_MAX_HASHED_BYTES = 2**28
_TOKENIZER_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}


def state_of_data(data: DataSection) -> Any:
    """The state of the source of a run's data, and of the file of its chat template.

    Raises:
        UserError: a package is not installed, or a dataset of the hub cannot be loaded.
    """
    template = [] if data.chat_template in (None, CHATML_NAME) else _states([Path(data.chat_template)])
    held_out = [_states(_files_of(Path(name))) for name in data.eval_files or []]
    return [template, *map(_state_of_source, data.each_source()), held_out]


def size_of_data(data: DataSection) -> int:
    """The bytes of the files that a run's data is read from; 0 where that is not known, as for data of the hub."""
    names = list(data.eval_files or [])
    for source in data.each_source():
        names += [*(source.files or []), *filter(None, [source.hub])]
    return sum(file.stat().st_size for name in names for file in _files_of(Path(name)) if file.is_file())


def _state_of_source(data: DataSection) -> Any:
    if data.docstrings is not None:
        return _states(source_files(data.docstrings, "data.docstrings"))
    if data.summaries is not None:
        return _states(source_files(data.summaries, "data.summaries"))
    if data.files is not None:
        return [_states(_files_of(Path(name))) for name in data.files]
    assert data.hub is not None
    if Path(data.hub).is_dir():
        return _states(_files_of(Path(data.hub)))
    rows = load_hub(data.hub, data.hub_configuration, data.split)
    # datasets keeps each version of a dataset in a directory of its own.
    return [file["filename"] for file in getattr(rows, "cache_files", [])]


def state_of_tokenizer(name: str) -> Any:
    """The state of a tokenizer: of its files where it is a directory, of its version on the hub where it is not."""
    directory = Path(name)
    if directory.is_dir():
        return [name, _states(sorted(path for path in directory.iterdir() if path.suffix in _TOKENIZER_SUFFIXES))]
    from transformers.utils.hub import cached_file

    try:
        return [name, str(cached_file(name, "tokenizer_config.json"))]  # the path names the version
    except OSError:  # `load_tokenizer` raises the error
        return [name]


def _files_of(path: Path) -> list[Path]:
    return sorted(child for child in path.rglob("*") if child.is_file()) if path.is_dir() else [path]


def _states(files: list[Path]) -> list[tuple[Any, ...]]:
    return [(str(path), *_state(path)) for path in files]


def _state(path: Path) -> tuple[Any, ...]:
    try:
        status = path.stat()
        if status.st_size > _MAX_HASHED_BYTES:
            return (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        return (hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest(),)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
