"""Tokenizes stored examples in several processes, into files of rows that are read from the disk."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute
from numpy.typing import NDArray

from moreh.system import available_cores
from utils.config.data_section import DataSection
from utils.data.content import hash_of_row, hash_of_rows
from utils.data.examples import StoredExamples, decode_conversation, decode_pair
from utils.data.rows import KEPT, Outcome, Row, RowCounts, count_rows
from utils.data.tokenization import MakeExample, encode_conversations, encode_pairs
from utils.environment import restored_variables
from utils.text.spelled_tokens import SpelledTokens

_PER_BATCH = 512
# Starting a process takes longer than tokenizing fewer examples than this.
_PER_PROCESS = 5000
# 32 bits for ids and labels: half the size on the disk.
_IDS = datasets.Sequence(datasets.Value("int32"))
_ROW = {
    "input_ids": _IDS,
    "labels": _IDS,
    "prompt_length": datasets.Value("int32"),
    "location": datasets.Value("string"),
}
# The columns by which rows are selected, and which the log counts.
_RESULT = {
    "outcome": datasets.Value("int8"),
    "content_hash": datasets.Value("int64"),
    "problem": datasets.Value("string"),
    "unlearned_answers": datasets.Value("int32"),
    "spelled": datasets.Value("string"),
}
_FILES = "rows*.arrow"


@dataclass(frozen=True)
class EncodedExamples:
    """The outcomes of the examples, in their order."""

    dataset: datasets.Dataset
    """The rows, with the columns of `_ROW` and `_RESULT`."""
    outcomes: NDArray[np.int8]
    """The `Outcome` of each example: `[examples]`."""
    notes: list[str]
    """Log lines about control tokens in the texts."""

    def kept(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The indices whose rows are trained on or evaluated."""
        return indices[np.isin(self.outcomes[indices], KEPT)]

    def content(self, indices: NDArray[np.int64]) -> str:
        """A hash of the rows with these indices that are kept, in their order."""
        return hash_of_rows(self.dataset.data.column("content_hash").to_numpy()[self.kept(indices)])

    def counts(self, indices: NDArray[np.int64]) -> RowCounts:
        """The counts of the examples with these indices, by outcome."""
        outcomes = self.outcomes[indices]
        unusable = indices[outcomes == Outcome.UNUSABLE]
        first_unusable = self.dataset[int(unusable.min())]["problem"] if len(unusable) else ""
        unlearned = self.dataset.data.column("unlearned_answers").to_numpy()[self.kept(indices)]
        return count_rows(outcomes, first_unusable, int(unlearned.sum()))


def encode_examples(
    examples: StoredExamples, directory: Path, tokenizer: Any, data: DataSection, make_example: MakeExample
) -> EncodedExamples:
    """Tokenize all examples into files of a directory, which `read_rows` reads.

    Raises:
        UserError: the chat template refuses a conversation, and `data.unusable` is `refuse`.
    """
    processes = min(available_cores(), len(examples.dataset) // _PER_PROCESS)
    with restored_variables("TOKENIZERS_PARALLELISM"):
        if processes > 1:  # otherwise a tokenizer uses all cores by itself
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        encoded = examples.dataset.map(
            partial(_encode_batch, tokenizer=tokenizer, data=data, make_example=make_example),
            batched=True,
            batch_size=_PER_BATCH,
            remove_columns=examples.dataset.column_names,
            features=datasets.Features({**_ROW, **_RESULT}),
            num_proc=processes if processes > 1 else None,
            cache_file_name=str(directory / _FILES.replace("*", "")),
            load_from_cache_file=False,
            new_fingerprint="rows",
            desc="tokenizing",
        )
    spelled = SpelledTokens(tokenizer, data)
    counts = encoded.data.column("spelled")
    for text in pyarrow.compute.filter(counts, pyarrow.compute.not_equal(counts, "")):
        spelled.add(json.loads(text.as_py()))
    return EncodedExamples(encoded, encoded.data.column("outcome").to_numpy(), spelled.notes())


def read_rows(directory: Path) -> datasets.Dataset:
    """The rows of all examples, with the fields of a `Row`; memory-mapped. Those that are not kept have no ids."""
    files = sorted(directory.glob(_FILES))
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files]).select_columns(
        list(_ROW)
    )


def _encode_batch(
    batch: Mapping[str, list[str]], tokenizer: Any, data: DataSection, make_example: MakeExample
) -> dict[str, list[Any]]:
    spelled = SpelledTokens(tokenizer, data)
    rows: list[Row]
    if data.format == "chat":
        conversations = list(map(decode_conversation, batch["location"], batch["content"]))
        rows = encode_conversations(conversations, tokenizer, data, spelled)
    else:
        pairs = list(map(decode_pair, batch["location"], batch["content"]))
        rows = encode_pairs(pairs, tokenizer, data, make_example, spelled)
    columns = {
        name: [getattr(row, name) for row in rows] for name in (*_ROW, "outcome", "problem", "unlearned_answers")
    }
    columns["content_hash"] = list(map(hash_of_row, rows))
    return {**columns, "spelled": [json.dumps(spelled.counts()), *[""] * (len(rows) - 1)]}
