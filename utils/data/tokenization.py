"""Token ids of the pairs, from a tokenizer that is trained on them or from a given one."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from utils.config.data_section import DataSection
from utils.data.labels import IGNORED
from utils.data.records import Pair
from utils.text.encoding import encode_continuations, encode_prompts
from utils.text.spelled_tokens import SpelledTokens

END_OF_TEXT = "<|endoftext|>"
_PAIRS_PER_CALL = 512
# Training takes the square of a word's length: a minute for 100,000 letters in a row. No token is as long as this.
_MAX_WORD = 256
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{_MAX_WORD + 1},}}|(?<!\s)\s{{{_MAX_WORD + 1},}}")

# A function of the training script: given the ids of prompt and response, the id of the end-of-text token and
# `data.loss_on`, the token ids and labels of a row.
MakeExample = Callable[[list[int], list[int], int, str], tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Row:
    """A tokenized pair."""

    location: str
    """Where its record was read."""
    input_ids: list[int]
    """Token ids of prompt, response and end of text."""
    labels: list[int]
    """A label for each token: its id, or -100 if it is not learned."""
    prompt_length: int
    """The number of tokens of the prompt, with which a sample begins."""


@dataclass(frozen=True)
class RowCounts:
    """What became of the pairs."""

    kept: int = 0
    """Rows to train on or to evaluate."""
    truncated: int = 0
    """How many of the kept rows lost their end."""
    dropped_too_long: int = 0
    """Pairs dropped for their length."""
    dropped_without_label: int = 0
    """Pairs dropped because all their labels were cut off: they would count as a loss of 0."""
    notes: list[str] = field(default_factory=list)
    """What the log says about control tokens in the texts, a line each."""

    def __str__(self) -> str:
        return (
            f"{self.kept} kept ({self.truncated} of them truncated), {self.dropped_too_long} dropped for their length, "
            f"{self.dropped_without_label} dropped because no label was left"
        )


def train_tokenizer(
    texts: Iterable[str], vocabulary_size: int, end_token: str = END_OF_TEXT
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer like GPT-2's, trained on the texts. Its end-of-text token also begins and pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[end_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _in_pieces(text)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end_token, eos_token=end_token, pad_token=end_token
    )


def encode_pairs(
    pairs: list[Pair], tokenizer: Any, data: DataSection, make_example: MakeExample
) -> tuple[list[Row], RowCounts]:
    """Tokenize pairs, and truncate or drop the long ones. Pairs that are left without a label are dropped.

    Prompt and response are tokenized separately, so that no token spans their border. Generation, which gets only the
    prompt, then gets the same ids.
    """
    rows = []
    truncated = too_long = without_label = 0
    spelled = SpelledTokens(tokenizer, data)
    chunks = range(0, len(pairs), _PAIRS_PER_CALL)
    for start in tqdm(chunks, desc="tokenizing", unit_scale=_PAIRS_PER_CALL, unit=" pairs", disable=None):
        chunk = pairs[start : start + _PAIRS_PER_CALL]
        prompts = encode_prompts([spelled.in_prompt(pair.prompt) for pair in chunk], tokenizer)
        texts = [spelled.in_response(pair.response) for pair in chunk]
        responses = encode_continuations(texts, tokenizer, parse=data.control_tokens == "parse")
        for pair, prompt, response in zip(chunk, prompts, responses, strict=True):
            input_ids, labels = make_example(prompt, response, tokenizer.eos_token_id, data.loss_on)
            is_too_long = len(input_ids) > data.max_length
            if is_too_long and data.too_long == "drop":
                too_long += 1
                continue
            input_ids, labels = input_ids[: data.max_length], labels[: data.max_length]
            if all(label == IGNORED for label in labels[1:]):  # nothing predicts the first token
                without_label += 1
                continue
            truncated += is_too_long
            rows.append(Row(pair.location, input_ids, labels, len(prompt)))
    return rows, RowCounts(len(rows), truncated, too_long, without_label, spelled.notes())


def _in_pieces(text: str) -> Iterator[str]:
    """A text, cut in runs of characters that are longer than any token."""
    end = 0
    for match in _LONG_RUN.finditer(text):
        for cut in range(match.start() + _MAX_WORD, match.end(), _MAX_WORD):
            yield text[end:cut]
            end = cut
    yield text[end:]
