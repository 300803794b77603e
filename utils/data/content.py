"""Hashes of what a run trains on, by which a checkpoint knows whether it is the same."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from utils.data.rows import Row

_DIGEST_BYTES = 8


def hash_of_rows(rows: Sequence[Row]) -> str:
    """A hash of the ids and labels of rows, in their order. Where a row was read does not count."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for row in rows:
        digest.update(np.array([len(row.input_ids), *row.input_ids, *row.labels], dtype=np.int64).tobytes())
    return digest.hexdigest()


def hash_of_tokenizer(tokenizer: Any) -> str:
    """A hash of a tokenizer's tokens with their ids, its special tokens and its chat template."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    content = [sorted(tokenizer.get_vocab().items()), special, tokenizer.chat_template]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=_DIGEST_BYTES).hexdigest()
