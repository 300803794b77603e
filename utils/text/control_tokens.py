"""Names of control tokens, such as `</s>` or `<|im_end|>`, that are spelled out in a text."""

import re
from typing import Any

from utils.text.template import FilledPrompt

# What models call the token that ends a text or a turn.
_END_NAMES = (
    r"</s>|<\|?(?:end|eos|eot|eot_id|eom_id|im_end|endoftext|end_of_text|end_of_turn)\|?>"
    r"|<\uff5cend\u2581of\u2581sentence\uff5c>"
)
_ENDING = re.compile(rf"(?:(?:{_END_NAMES})\s*)+$")
_NOTHING = re.compile(r"(?!)")


def control_token_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches the name of each control token of a tokenizer; of two that begin alike, the longer one."""
    names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names |= set(tokenizer.all_special_tokens)
    names.discard("")
    if not names:
        return _NOTHING
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def split_at_spelled(prompt: str, pattern: re.Pattern[str]) -> list[tuple[str, bool]]:
    """The pieces of a prompt, each with whether it is the name of a control token that came from a field.

    A prompt without a template has one piece, in which names of control tokens are the tokens.
    """
    if not isinstance(prompt, FilledPrompt):
        return [(prompt, False)]
    pieces, end = [], 0
    for match in pattern.finditer(prompt):
        if any(match.start() < last and first < match.end() for first, last in prompt.fields):
            pieces += [(prompt[end : match.start()], False), (match[0], True)]
            end = match.end()
    return [*pieces, (prompt[end:], False)]


def without_end_token(response: str, tokenizer: Any, pattern: re.Pattern[str]) -> tuple[str, str | None]:
    """A response without the end tokens that are spelled at its end, and the last of their names if there was one.

    The row ends with the end token anyway, and a name would be learned as its letters.
    """
    last = None
    while True:
        stripped = response.rstrip()
        name = next((name for name in _candidates(stripped, tokenizer) if pattern.fullmatch(name)), None)
        if name is None:
            return response, last
        response, last = stripped[: -len(name)], last or name


def unknown_end_token(response: str, pattern: re.Pattern[str]) -> str | None:
    """The end token of some other tokenizer that is spelled at the end of a response, which this one reads as text."""
    match = _ENDING.search(response)
    return None if match is None or pattern.match(match[0]) else match[0].strip()


def _candidates(text: str, tokenizer: Any) -> list[str]:
    """Names that may end a text: the tokenizer's own end token, and the end tokens of other tokenizers."""
    names = [tokenizer.eos_token] if text.endswith(tokenizer.eos_token) else []
    match = re.search(rf"(?:{_END_NAMES})$", text)
    return [*names, match[0]] if match is not None else names
