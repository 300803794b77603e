"""Renders conversations with a chat template, and finds the characters that the assistant writes."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.errors import UserError, first_line
from utils.text.control_tokens import control_token_pattern, split_at_spelled
from utils.text.encoding import encode_continuations
from utils.text.template import FilledPrompt

# A message of a conversation: `role`, `content`, and what else the template reads, such as `tool_calls`.
Message = Mapping[str, Any]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The chat template `chatml`, also that of a tokenizer that is trained on conversations."""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
"""The control tokens of `CHATML`."""

# Marks around the content of message i, in a private-use plane that no text uses: FIRST + 2 i and FIRST + 2 i + 1.
_FIRST_MARK = 0xF0000
_MAX_MESSAGES = 32_000

_Span = tuple[int, int]


class ChatError(UserError):
    """A chat template cannot render a conversation, or hides what the assistant writes in it."""


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as the model reads it. Spans are [first character, last character + 1]."""

    text: str
    """The whole conversation, control tokens included."""
    fields: tuple[_Span, ...]
    """The spans that came from the contents of messages; there, the name of a control token is text."""
    answers: tuple[_Span, ...]
    """The text that the assistant writes: each turn after its header, up to and including the token that ends it."""

    @property
    def marked_text(self) -> FilledPrompt:
        """The text, with which of its parts came from the messages."""
        return FilledPrompt(self.text, self.fields)


def end_of_turn(tokenizer: Any) -> str:
    """The token with which the chat template ends a turn of the assistant, such as `<|im_end|>`.

    Raises:
        ChatError: there is no template, or a turn does not end with a token of the tokenizer, so that generation could
            not stop.
    """
    if not tokenizer.chat_template:
        raise ChatError(
            "the tokenizer has no chat template: name chatml or a file with a template in data.chat_template"
        )
    answer = _marked("a", 1)
    text = _render([{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}], tokenizer)
    rest = text[text.rfind(answer[-1]) + 1 :]
    tokens = [(rest.find(token), -len(token), token) for token in _added_tokens(tokenizer) if token in rest]
    if not tokens:
        shown = f"{rest.strip()!r}, which is not a token of the tokenizer" if rest.strip() else "no token"
        raise ChatError(
            f"the chat template ends a turn of the assistant with {shown}, so no model could learn to stop there: "
            "give a tokenizer that has the template's tokens, or another template in data.chat_template"
        )
    return min(tokens)[2]


def render_chat(messages: Sequence[Message], tokenizer: Any, end: str, tools: Any = None) -> RenderedChat:
    """A conversation in the tokenizer's chat template; `end` is its `end_of_turn`.

    What the assistant writes begins where the template's prompt for an answer ends.

    Raises:
        ChatError: the template refuses the messages, changes their texts, or leaves an answer without its end.
    """
    text = _render(messages, tokenizer, tools)
    contents = _contents(messages, text, tokenizer, tools)
    answers: list[_Span] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        begin, content_end = contents.get(index, (None, None))
        after = answers[-1][1] if answers else 0
        start = _start_of_answer(messages[:index], text, begin, after, tokenizer, tools)
        if begin is None and content_end is not None:
            contents[index] = (start, content_end)
        found = text.find(end, max(start, content_end or 0))
        following = (span[0] for later, span in contents.items() if later > index and span[0] is not None)
        if found < 0 or found > min(following, default=len(text)):
            raise ChatError(f"the chat template ends message {index + 1}, of the assistant, without {end}")
        _check_calls_are_shown(message, index, text[start:found])
        answers.append((start, found + len(end)))
    fields = tuple(sorted((begin, last) for begin, last in contents.values() if begin is not None))
    return RenderedChat(text, fields, tuple(answers))


def prompt_for_answer(messages: Sequence[Message], tokenizer: Any) -> FilledPrompt:
    """A conversation up to where the assistant's next turn begins."""
    text = _render(messages, tokenizer, None, add_generation_prompt=True)
    contents = _contents(messages, text, tokenizer, None, add_generation_prompt=True)
    return FilledPrompt(text, tuple(sorted((begin, end) for begin, end in contents.values() if begin is not None)))


def encode_segments(segments: list[FilledPrompt], tokenizer: Any, *, parse: bool) -> list[list[int]]:
    """Token ids of pieces of rendered conversations, without tokens that the tokenizer adds automatically.

    The name of a control token is the token; in a field it is text, unless `parse` is set.
    """
    pattern = control_token_pattern(tokenizer)
    pieces = [
        (index, text, is_spelled)
        for index, segment in enumerate(segments)
        for text, is_spelled in split_at_spelled(str(segment) if parse else segment, pattern)
    ]
    encoded: dict[bool, list[list[int]]] = {}
    for spelled in (False, True):
        texts = [text for _, text, is_spelled in pieces if is_spelled is spelled]
        encoded[spelled] = encode_continuations(texts, tokenizer, parse=not spelled) if texts else []
    iterators = {spelled: iter(rows) for spelled, rows in encoded.items()}
    ids: list[list[int]] = [[] for _ in segments]
    for index, _, is_spelled in pieces:
        ids[index] += next(iterators[is_spelled])
    return ids


def segments_of(chat: RenderedChat) -> list[tuple[FilledPrompt, bool]]:
    """A conversation cut where answers begin and end, and whether each segment is an answer.

    Each is encoded separately, so that no token spans a border: generation gets only what is before an answer.
    """
    cuts = [0, *(cut for answer in chat.answers for cut in answer), len(chat.text)]
    segments = []
    for number, (first, last) in enumerate(itertools.pairwise(cuts)):
        inside = ((max(begin, first) - first, min(end, last) - first) for begin, end in chat.fields)
        fields = tuple((begin, end) for begin, end in inside if begin < end)
        if first < last:
            segments.append((FilledPrompt(chat.text[first:last], fields), number % 2 == 1))
    return segments


def _check_calls_are_shown(message: Message, index: int, answer: str) -> None:
    """Refuse a template that leaves the calls of functions out: the model would learn to answer nothing instead."""
    calls = message.get("tool_calls") or ()
    for call in calls if isinstance(calls, Sequence) else ():
        function = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and name not in answer:
            raise ChatError(
                f"message {index + 1} calls the function {name!r}, which the chat template does not show: give one "
                "that shows tool_calls in data.chat_template"
            )


def _start_of_answer(
    earlier: Sequence[Message], text: str, content: int | None, after: int, tokenizer: Any, tools: Any
) -> int:
    """The start of an answer to the earlier messages in the text of the whole conversation."""
    try:
        prompt = _render(earlier, tokenizer, tools, add_generation_prompt=True) if earlier else None
    except ChatError:
        prompt = None
    if prompt is not None and text.startswith(prompt) and len(prompt) >= after:
        return len(prompt)
    # The template renders earlier turns otherwise once later ones follow, as some do with what was thought in them.
    question = [{"role": "user", "content": "a"}]
    header = _render(question, tokenizer, add_generation_prompt=True).removeprefix(_render(question, tokenizer))
    found = text.rfind(header, after, content) if header and content is not None else -1
    if found < 0:
        raise ChatError(f"message {len(earlier) + 1}: the chat template does not show where this answer begins")
    return found + len(header)


def _contents(
    messages: Sequence[Message], text: str, tokenizer: Any, tools: Any, *, add_generation_prompt: bool = False
) -> dict[int, tuple[int | None, int]]:
    """The place of each message's content in the rendered text, found by rendering the contents between marks.

    A content of white space is left out. The beginning is None where the template cuts a content, as it may with
    what the assistant thought before its answer.
    """
    if len(messages) > _MAX_MESSAGES:
        raise ChatError(f"the conversation has {len(messages)} messages, more than {_MAX_MESSAGES}")
    marked_messages = [
        {**message, "content": _marked(message["content"], index)} if message.get("content") else message
        for index, message in enumerate(messages)
    ]
    marked = _render(marked_messages, tokenizer, tools, add_generation_prompt=add_generation_prompt)
    begins: dict[int, int] = {}
    spans: dict[int, tuple[int | None, int]] = {}
    plain: list[str] = []
    for character in marked:
        mark = ord(character) - _FIRST_MARK
        if not 0 <= mark < 2 * len(messages):
            plain.append(character)
        elif mark % 2 == 0:
            begins[mark // 2] = len(plain)
        else:
            spans[mark // 2] = (begins.get(mark // 2), len(plain))
    if "".join(plain) != text:
        raise ChatError("the chat template changes the texts of the messages, so it does not show which are answers")
    return spans


def _marked(content: str, index: int) -> str:
    """A content with marks inside of the white space at its ends, which templates strip."""
    if not (core := content.strip()):
        return content
    if any(_FIRST_MARK <= ord(character) < _FIRST_MARK + 2 * _MAX_MESSAGES for character in core):
        raise ChatError(f"message {index + 1} has characters of a private-use plane, which mark contents here")
    begin = content.index(core[0]) if core else 0
    end = begin + len(core)
    first, last = chr(_FIRST_MARK + 2 * index), chr(_FIRST_MARK + 2 * index + 1)
    return content[:begin] + first + core + last + content[end:]


def _render(messages: Sequence[Message], tokenizer: Any, tools: Any = None, **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, **options))
    except Exception as error:  # a template may fail in any way, and raises errors of its own for roles
        raise ChatError(f"the chat template refuses the messages: {first_line(error)}") from error


def _added_tokens(tokenizer: Any) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
