"""Data of tiny runs, prepared as train_gpt.py prepares it."""

import numpy as np

import train_gpt
from utils.data.dataset import prepare_data
from utils.data.rows import KEPT, count_rows
from utils.data.sources.reading import ExampleReader, maker_of_pairs, source_records
from utils.data.tokenization import encode_pairs
from utils.text.spelled_tokens import SpelledTokens


def prepare(config, info=lambda line: None):
    """The data of a run."""
    return prepare_data(config, train_gpt.make_pair, train_gpt.make_example, info)


def texts_of(data):
    """The prompts and responses of a section of the settings."""
    reader = ExampleReader(data, source_records(data), maker_of_pairs(data, train_gpt.make_pair))
    return [(pair.prompt, pair.response) for pair in reader]


def encode(pairs, tokenizer, data):
    """The rows of some pairs that are kept, what became of all, and the notes for the log."""
    spelled = SpelledTokens(tokenizer, data)
    rows = encode_pairs(pairs, tokenizer, data, train_gpt.make_example, spelled)
    counts = count_rows(np.array([row.outcome for row in rows], np.int8))
    return [row for row in rows if row.outcome in KEPT], counts, spelled.notes()
