"""Decodes answers without losing characters, at once or while streaming."""

from collections.abc import Callable
from typing import Any

from transformers.generation.streamers import BaseStreamer

# What a tokenizer shows for the bytes of a character that is not complete.
_INCOMPLETE = "\ufffd"


def decode_answer(ids: list[int], tokenizer: Any) -> str:
    """The text of token ids that continue another text, without control tokens.

    Tokenizers of the SentencePiece kind, such as Llama 2's, drop a space at the beginning of what they decode. So the
    ids are decoded after those of a letter, which is cut off.
    """
    letter_ids = next((found for letter in "a~1" if (found := _ids_that_decode_to(letter, tokenizer))), [])
    text = _decode([*letter_ids, *ids], tokenizer)
    return text[1:] if letter_ids else text


def _ids_that_decode_to(letter: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(letter, add_special_tokens=False)["input_ids"]
    return ids if _decode(ids, tokenizer) == letter else []


def _decode(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class AnswerStreamer(BaseStreamer):
    """Writes an answer while `model.generate` produces it; the joined pieces equal the result of `decode_answer`."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._ids: list[int] = []
        self._written = ""
        self._has_prompt = False

    def put(self, value: Any) -> None:
        """Take the prompt's ids, which come first, or those of the next token."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        self._ids += value.flatten().tolist()
        text = decode_answer(self._ids, self._tokenizer).rstrip(_INCOMPLETE)
        self._continue_with(text)

    def end(self) -> None:
        """Write the rest: a character that stayed incomplete."""
        self._continue_with(decode_answer(self._ids, self._tokenizer))

    def _continue_with(self, text: str) -> None:
        if text.startswith(self._written):
            self._write(text[len(self._written) :])
            self._written = text
