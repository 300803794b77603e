"""Data of tiny runs, prepared as train_gpt.py prepares it."""

import train_gpt
from utils.data.dataset import prepare_data
from utils.data.sources.reading import read_pairs
from utils.data.tokenization import encode_pairs


def prepare(config, info=lambda line: None):
    """The data of a run."""
    return prepare_data(config, train_gpt.make_pair, train_gpt.make_example, info)


def texts_of(data):
    """The prompts and responses of a section of the settings."""
    return [(pair.prompt, pair.response) for pair in read_pairs(data, train_gpt.make_pair)[0]]


def encode(pairs, tokenizer, data):
    """The rows of some pairs, and what became of them."""
    return encode_pairs(pairs, tokenizer, data, train_gpt.make_example)
