"""Token ids of the pairs, from a tokenizer that is trained on them or from a given one."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from utils.config.schema import DataSection
from utils.data.labels import IGNORED
from utils.data.records import Pair

END_OF_TEXT = "<|endoftext|>"
_PAIRS_PER_CALL = 512

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

    def __str__(self) -> str:
        return (
            f"{self.kept} kept ({self.truncated} of them truncated), {self.dropped_too_long} dropped for their length, "
            f"{self.dropped_without_label} dropped because no label was left"
        )


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer like GPT-2's, trained on the texts. Its end-of-text token also begins and pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
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
    chunks = range(0, len(pairs), _PAIRS_PER_CALL)
    for start in tqdm(chunks, desc="tokenizing", unit_scale=_PAIRS_PER_CALL, unit=" pairs", disable=None):
        chunk = pairs[start : start + _PAIRS_PER_CALL]
        prompts = encode_prompts([pair.prompt for pair in chunk], tokenizer)
        responses = _encode_responses([pair.response for pair in chunk], tokenizer)
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
    return rows, RowCounts(len(rows), truncated, too_long, without_label)


def _encode_responses(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of texts that continue another text. The name of a special token in a text is text like any other.

    Some tokenizers, such as Llama 2's, put a space before each text. For such a tokenizer, each text is encoded after a
    character that does not merge with it, and the ids of that character are removed.
    """

    def encode(batch: list[str]) -> list[list[int]]:
        encoded = tokenizer(batch, add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    ids_of_texts = encode(texts)
    if all(encode([first])[0] + encode(["a"])[0] == encode([first + "a"])[0] for first in ("\n", "~")):
        return ids_of_texts
    for separator in ("\t", "\n", "~"):
        (separator_ids,) = encode([separator])
        for index, ids in enumerate(encode([separator + text for text in texts])):
            if ids[: len(separator_ids)] == separator_ids:
                ids_of_texts[index] = ids[len(separator_ids) :]
    return ids_of_texts


def encode_prompts(prompts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of prompts, with the tokens that the tokenizer puts before a text but no end-of-text token after it.

    An empty prompt becomes the token that begins a text, so that the first token of the response has a predecessor.
    """
    encoded = tokenizer(prompts, verbose=False)["input_ids"]
    has_end = [
        bool(ids) and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token)
        for ids, prompt in zip(encoded, prompts, strict=True)
    ]
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [(ids[:-1] if end else ids) or [begin] for ids, end in zip(encoded, has_end, strict=True)]
