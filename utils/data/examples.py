"""The examples of a run, pairs or conversations, stored on disk."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from utils.data.conversations import Conversation
from utils.data.records import Pair

Example = Pair | Conversation
# Examples that are written, or read again for the tokenizer, at once.
_PER_BATCH = 1000
_SCHEMA = pa.schema({"location": pa.string(), "content": pa.large_string()})


@dataclass(frozen=True)
class StoredExamples:
    """Examples in a file, in the order in which they were read."""

    dataset: datasets.Dataset
    """Columns `location` and `content`, as `decode` reads them; memory-mapped."""
    digests: NDArray[np.uint64]
    """A hash of each example, equal for equal ones: `[examples, 2]`."""

    def texts(self, wanted: NDArray[np.bool_], decode: Callable[[str, str], Example]) -> Iterator[str]:
        """The texts of the wanted examples, which a mask names: `[examples]`."""
        for start in range(0, len(wanted), _PER_BATCH):
            batch = self.dataset[start : start + _PER_BATCH]
            for location, content, is_wanted in zip(batch["location"], batch["content"], wanted[start:], strict=False):
                if is_wanted:
                    yield decode(location, content).text


def store_examples(examples: Iterable[Example], path: Path) -> StoredExamples:
    """Write examples to a new file of Arrow."""
    digests = bytearray()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        for batch in _batches(examples):
            locations = [example.location for example in batch]
            contents = [json.dumps(example.content) for example in batch]
            writer.write_batch(pa.record_batch([locations, contents], schema=_SCHEMA))
            for example in batch:
                digests += hashlib.blake2b(json.dumps(example.key).encode(), digest_size=16).digest()
    return StoredExamples(datasets.Dataset.from_file(str(path)), np.frombuffer(digests, np.uint64).reshape(-1, 2))


def decode_pair(location: str, content: str) -> Pair:
    """A pair that was stored."""
    return Pair.from_content(location, json.loads(content))


def decode_conversation(location: str, content: str) -> Conversation:
    """A conversation that was stored."""
    return Conversation.from_content(location, json.loads(content))


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    batch: list[Any] = []
    for example in examples:
        batch.append(example)
        if len(batch) == _PER_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
