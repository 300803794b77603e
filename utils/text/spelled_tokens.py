"""Counts control tokens that are spelled out in the texts of a run, for the log."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from utils.config.data_section import DataSection
from utils.text.control_tokens import control_token_pattern, split_at_spelled, unknown_end_token, without_end_token
from utils.text.encoding import adds_begin_token


class SpelledTokens:
    """Counts the control tokens that texts spell, and takes end tokens off responses."""

    def __init__(self, tokenizer: Any, data: DataSection) -> None:
        self._tokenizer, self._data = tokenizer, data
        self._pattern = control_token_pattern(tokenizer)
        self._as_text: Counter[str] = Counter()
        self._ends: Counter[str] = Counter()
        self._unknown_ends: Counter[str] = Counter()

    def in_prompt(self, prompt: str) -> str:
        """The prompt as it is to be encoded: without the parts from fields where control tokens are tokens in them."""
        if self._data.control_tokens == "parse":
            return str(prompt)
        self._as_text.update({text for text, is_spelled in split_at_spelled(prompt, self._pattern) if is_spelled})
        return prompt

    def in_response(self, response: str) -> str:
        """The response as it is to be encoded: without an end token at its end."""
        response = self.without_end(response)
        if self._data.control_tokens == "text":
            self._as_text.update(set(self._pattern.findall(response)))
        return response

    def without_end(self, response: str) -> str:
        """The response without an end token at its end; only end tokens are counted."""
        response, end = without_end_token(response, self._tokenizer, self._pattern)
        if end is not None:
            self._ends[end] += 1
        elif (unknown := unknown_end_token(response, self._pattern)) is not None:
            self._unknown_ends[unknown] += 1
        return response

    def counts(self) -> list[Counter[str]]:
        """The counts, as JSON values."""
        return [self._as_text, self._ends, self._unknown_ends]

    def add(self, counts: Sequence[Mapping[str, int]]) -> None:
        """Add the `counts` of another process."""
        for counter, other in zip(self.counts(), counts, strict=True):
            counter.update(other)

    def notes(self) -> list[str]:
        """Lines for the log."""
        end, begin = self._tokenizer.eos_token, self._tokenizer.bos_token
        lines = []
        for name, count in self._ends.items():
            other = "" if name == end else f"; to train on {name} itself, give data.end_token"
            lines.append(f"{count} responses end with {name}: the row's own end token, {end}, takes its place{other}")
        for name, count in self._unknown_ends.items():
            lines.append(
                f"{count} responses end with {name!r}, which is not a token of this tokenizer: its letters are "
                f"learned, and {end} after them"
            )
        if self._as_text:
            names = ", ".join(name for name, _ in self._as_text.most_common(3))
            lines.append(
                f"control tokens spelled in {max(self._as_text.values())} of the texts ({names}): read as text "
                "(data.control_tokens=parse reads them as the tokens)"
            )
        template = self._data.template
        if begin and begin in template and adds_begin_token(self._tokenizer):
            others = template.count(begin) - template.startswith(begin)
            if template.startswith(begin):
                lines.append(f"data.template begins with {begin}, which the tokenizer adds by itself: one is kept")
            if others:
                lines.append(
                    f"data.template has {begin} where no text begins, and the tokenizer adds one by itself: rows have "
                    f"{others + 1}; take it out of the template unless the model was trained so"
                )
        return lines
