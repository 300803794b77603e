"""Encodes prompts and responses as token ids."""

from typing import Any

from utils.text.control_tokens import control_token_pattern, split_at_spelled

# Characters that most tokenizers merge with nothing that follows.
_SEPARATORS = ("\t", "\n", "~")


def encode_prompts(prompts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of prompts, with the tokens that the model expects before a text, and no end-of-text token.

    The name of a control token is the token, except in the fields of a `FilledPrompt`, where it is text. A begin token
    that a prompt spells is not added once more. An empty prompt becomes the token that begins a text, so that the first
    token of the response has a predecessor.
    """
    if not prompts:
        return []
    pattern = control_token_pattern(tokenizer)
    pieces = [split_at_spelled(prompt, pattern) for prompt in prompts]
    encoded = tokenizer([first for (first, _), *_ in pieces], verbose=False)["input_ids"]
    adds_begin = adds_begin_token(tokenizer)
    rows = []
    for ids, ((first, _), *others) in zip(encoded, pieces, strict=True):
        has_end = bool(ids) and ids[-1] == tokenizer.eos_token_id and not first.endswith(tokenizer.eos_token)
        row = ids[:-1] if has_end else ids
        if adds_begin and first.startswith(tokenizer.bos_token):
            row = row[1:]
        for text, is_spelled in others:
            (more,) = encode_continuations([text], tokenizer, parse=not is_spelled)
            row = row + more
        rows.append(row or [begin_token_id(tokenizer)])
    return rows


def begin_token_id(tokenizer: Any) -> int:
    """The token before an empty prompt: the one that begins a text, or where there is none the one that ends it."""
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


def adds_begin_token(tokenizer: Any) -> bool:
    """True if a tokenizer adds the begin token automatically."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def encode_continuations(texts: list[str], tokenizer: Any, *, parse: bool = False) -> list[list[int]]:
    """Token ids of texts that continue another text; `parse` reads the name of a control token as the token.

    Some tokenizers, such as Llama 2's, put a space before each text. With them a text is encoded after a character that
    it does not merge with, and the ids of that character are removed.
    """

    def encode(batch: list[str]) -> list[list[int]]:
        encoded = tokenizer(batch, add_special_tokens=False, split_special_tokens=not parse, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    ids_of_texts = encode(texts)
    if all(encode([first])[0] + encode(["a"])[0] == encode([first + "a"])[0] for first in ("\n", "~")):
        return ids_of_texts
    for separator in _SEPARATORS:
        (separator_ids,) = encode([separator])
        for index, ids in enumerate(encode([separator + text for text in texts])):
            if ids[: len(separator_ids)] == separator_ids:
                ids_of_texts[index] = ids[len(separator_ids) :]
    return ids_of_texts
