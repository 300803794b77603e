"""Token ids of the pairs, from a tokenizer that is trained on them or from a given one."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from utils.config.data_section import DataSection
from utils.data.conversations import Conversation, encode_conversation
from utils.data.records import Pair, UnusableRow
from utils.data.rows import Row, fit_row, unusable_row
from utils.errors import UserError
from utils.text.chat import end_of_turn
from utils.text.encoding import encode_continuations, encode_prompts
from utils.text.spelled_tokens import SpelledTokens

END_OF_TEXT = "<|endoftext|>"
# Training takes the square of a word's length: a minute for 100,000 letters in a row. No token is as long as this.
_MAX_WORD = 256
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{_MAX_WORD + 1},}}|(?<!\s)\s{{{_MAX_WORD + 1},}}")

# A function of the training script: given the ids of prompt and response, the id of the end-of-text token and
# `data.loss_on`, the token ids and labels of a row.
MakeExample = Callable[[list[int], list[int], int, str], tuple[list[int], list[int]]]


def train_tokenizer(
    texts: Iterable[str], vocabulary_size: int, end_token: str = END_OF_TEXT, control_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer like GPT-2's, trained on the texts. Its end-of-text token also begins and pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[end_token, *control_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _in_pieces(text)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end_token,
        eos_token=end_token,
        pad_token=end_token,
        additional_special_tokens=list(control_tokens),
    )


def encode_pairs(
    pairs: Sequence[Pair], tokenizer: Any, data: DataSection, make_example: MakeExample, spelled: SpelledTokens
) -> list[Row]:
    """Tokenize pairs: a row for each, cut or dropped where it is long, dropped where it is left without a label.

    Prompt and response are tokenized separately, so that no token spans their border. Generation, which gets only the
    prompt, then gets the same ids.
    """
    prompts = encode_prompts([spelled.in_prompt(pair.prompt) for pair in pairs], tokenizer)
    texts = [spelled.in_response(pair.response) for pair in pairs]
    responses = encode_continuations(texts, tokenizer, parse=data.control_tokens == "parse")
    rows = []
    for pair, prompt, response in zip(pairs, prompts, responses, strict=True):
        input_ids, labels = make_example(prompt, response, tokenizer.eos_token_id, data.loss_on)
        rows.append(fit_row(Row(pair.location, input_ids, labels, len(prompt)), data))
    return rows


def encode_conversations(
    conversations: Sequence[Conversation], tokenizer: Any, data: DataSection, spelled: SpelledTokens
) -> list[Row]:
    """Tokenize conversations in the tokenizer's chat template: a row for each, like `encode_pairs`.

    Raises:
        UserError: the template ends the assistant's turns with no token, or refuses a conversation.
    """
    end = end_of_turn(tokenizer)
    rows = []
    for conversation in conversations:
        try:
            rows.append(fit_row(encode_conversation(conversation, tokenizer, end, data, spelled), data))
        except UnusableRow as error:
            if data.unusable == "refuse":
                raise UserError(f"{error} (data.unusable=skip leaves such rows out)") from None
            rows.append(unusable_row(conversation.location, error))
    return rows


def _in_pieces(text: str) -> Iterator[str]:
    """A text, cut in runs of characters that are longer than any token."""
    end = 0
    for match in _LONG_RUN.finditer(text):
        for cut in range(match.start() + _MAX_WORD, match.end(), _MAX_WORD):
            yield text[end:cut]
            end = cut
    yield text[end:]
