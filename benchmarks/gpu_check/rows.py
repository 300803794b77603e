"""Rows of token ids from the docstrings of Python's standard library: text without a file or a network.

A token is a word or a mark; its id is a checksum of it. Models with random weights learn from such ids as from those of
a tokenizer.
"""

import ast
import functools
import random
import re
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

IGNORED = -100
# Ids below are for padding and the like.
FIRST_ID = 3
_TOKEN = re.compile(r"\w+|[^\w\s]|\s+")
# So many modules have text for every workload. All of them would take seconds to read.
MODULES = 60


@dataclass(frozen=True)
class Batch:
    """Padded rows as a model takes them."""

    input_ids: torch.Tensor
    """Token ids, `[rows, length]`; 0 where a row is padded."""
    attention_mask: torch.Tensor
    """1 at tokens and 0 at padding."""
    labels: torch.Tensor
    """The ids after a row's prompt, else -100."""

    def to(self, device: str) -> dict[str, torch.Tensor]:
        """The arguments of a model on a device."""
        return {name: tensor.to(device) for name, tensor in vars(self).items()}

    @property
    def label_tokens(self) -> int:
        """Tokens that a loss is computed for: nothing predicts the first token of a row."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    @property
    def lengths(self) -> list[int]:
        """The tokens of each row without padding."""
        return [int(length) for length in self.attention_mask.sum(1)]


@functools.cache
def docstrings() -> tuple[str, ...]:
    """The docstrings of the first modules of the standard library, in the order of their names."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))[:MODULES]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    found.append(text)
    return tuple(found)


@functools.cache
def tokens(vocabulary: int) -> tuple[int, ...]:
    """The ids of all docstrings, one after the other."""
    words = (word for text in docstrings() for word in _TOKEN.findall(text))
    return tuple(FIRST_ID + zlib.crc32(word.encode()) % (vocabulary - FIRST_ID) for word in words)


def make_batch(seed: int, vocabulary: int, rows: int, length: int, mean_length: int | None = None) -> Batch:
    """A batch of rows, padded on the right to `length` tokens, of which the first fifth of each row is its prompt.

    Lengths are distributed as those of chats: many short rows, few long ones, about `mean_length` on average. Without
    a mean, every row is full and has labels from its beginning.
    """
    draw = random.Random(seed)
    text = tokens(vocabulary)
    ids = torch.zeros(rows, length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row in range(rows):
        size = length
        if mean_length is not None:
            size = max(4, min(length, round(draw.lognormvariate(0, 0.8) * mean_length / 1.38)))
        start = draw.randrange(len(text))
        words = [text[(start + index) % len(text)] for index in range(size)]
        ids[row, :size] = torch.tensor(words)
        mask[row, :size] = 1
        prompt = 0 if mean_length is None else size // 5
        labels[row, prompt:size] = ids[row, prompt:size]
    return Batch(ids, mask, labels)
