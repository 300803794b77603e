"""Token ids of the pairs: a tokenizer trained on them or a given one, and the border between prompt and response."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from utils.config.schema import DataSection
from utils.data.data_sources import Pair

END_OF_TEXT = "<|endoftext|>"
_PAIRS_AT_ONCE = 512


@dataclass(frozen=True)
class Row:
    """A tokenized pair: ids of prompt, response and end of text; the first `prompt_length` of them are the prompt's."""

    place: str
    input_ids: list[int]
    prompt_length: int


@dataclass(frozen=True)
class RowCounts:
    """What became of the pairs."""

    kept: int = 0
    truncated: int = 0
    dropped_too_long: int = 0
    dropped_without_label: int = 0

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


def encode_pairs(pairs: list[Pair], tokenizer: Any, data: DataSection) -> tuple[list[Row], RowCounts]:
    """Tokenize pairs and cut or drop the long ones; pairs that are left without a label are dropped.

    Prompt and response are tokenized apart, so no token spans their border and generation, which sees the prompt alone,
    sees the same ids. In a response the end-of-text token's name is text like any other.
    """
    rows = []
    truncated = too_long = without_label = 0
    starts = range(0, len(pairs), _PAIRS_AT_ONCE)
    for start in tqdm(starts, desc="tokenizing", unit_scale=_PAIRS_AT_ONCE, unit=" pairs", disable=None):
        some = pairs[start : start + _PAIRS_AT_ONCE]
        prompts = encode_prompts([pair.prompt for pair in some], tokenizer)
        responses = _encode_continuations([pair.response for pair in some], tokenizer)
        for pair, prompt, response in zip(some, prompts, responses, strict=True):
            whole = [*prompt, *response, tokenizer.eos_token_id]
            if len(whole) > data.max_length and data.too_long == "drop":
                too_long += 1
                continue
            ids = whole[: data.max_length]
            first_label = max(len(prompt) if data.loss_on == "response" else 0, 1)
            if first_label >= len(ids):
                without_label += 1
                continue
            truncated += len(ids) < len(whole)
            rows.append(Row(pair.place, ids, len(prompt)))
    return rows, RowCounts(len(rows), truncated, too_long, without_label)


def _encode_continuations(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Ids of texts that go on where another one ended.

    Some tokenizers, such as Llama 2's, put a space before whatever they are given. They are given one more character, with
    which a text does not merge, and its ids are taken off again.
    """

    def encode(some: list[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(some, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]
        return ids

    plain = encode(texts)
    if all(encode([first])[0] + encode(["a"])[0] == encode([first + "a"])[0] for first in ("\n", "~")):
        return plain
    for before in ("\t", "\n", "~"):
        (ids_before,) = encode([before])
        for index, both in enumerate(encode([before + text for text in texts])):
            if both[: len(ids_before)] == ids_before:
                plain[index] = both[len(ids_before) :]
    return plain


def encode_prompts(prompts: list[str], tokenizer: Any) -> list[list[int]]:
    """Ids of prompts as the model expects a text to begin; an end-of-text token that a tokenizer adds is taken off.

    An empty prompt is the token that begins a text, so that the first token of the response has something before it.
    """
    encoded = tokenizer(prompts, verbose=False)["input_ids"]
    ends = [
        bool(ids) and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token)
        for ids, prompt in zip(encoded, prompts, strict=True)
    ]
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [(ids[:-1] if end else ids) or [begin] for ids, end in zip(encoded, ends, strict=True)]
