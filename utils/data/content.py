"""Hashes of the training data and the tokenizer, by which a checkpoint detects changes."""

import hashlib
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.data.rows import Row

_DIGEST_BYTES = 8


def hash_of_row(row: Row) -> int:
    """A hash of the ids and labels of a row, in 64 bits. Where it was read does not count."""
    content = np.array([*row.input_ids, *row.labels], dtype=np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest(), "little", signed=True)


def hash_of_rows(hashes: NDArray[np.int64]) -> str:
    """A hash of rows in their order, from the hash of each: `[rows]`."""
    return hashlib.blake2b(hashes.tobytes(), digest_size=_DIGEST_BYTES).hexdigest()


def hash_of_tokenizer(tokenizer: Any) -> str:
    """A hash of a tokenizer's tokens with their ids, its special tokens and its chat template."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    content = [sorted(tokenizer.get_vocab().items()), special, tokenizer.chat_template]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=_DIGEST_BYTES).hexdigest()
