"""Reads conversations, and encodes them as rows of token ids with labels on the answers."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import Self

from utils.config.data_section import DataSection
from utils.data.labels import IGNORED
from utils.data.records import Record
from utils.data.rows import Row
from utils.text.chat import ChatError, Message, encode_segments, render_chat, segments_of
from utils.text.control_tokens import control_token_pattern
from utils.text.spelled_tokens import SpelledTokens

# The fields of a row that may hold its messages, and their names for the role and the text of a message.
_LAYOUTS = {"messages": ("role", "content"), "conversations": ("from", "value")}
# Other names of the roles.
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "observation": "tool"}
# In ShareGPT's layout, a turn of the assistant whose text is the call of a function, as JSON.
_CALL_ROLE = "function_call"
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
# Fields of an answer that say if it is trained on: OpenAI's, and the two of Axolotl's examples.
_TRAINED_FIELDS = ("weight", "train", "training")


@dataclass(frozen=True)
class Conversation:
    """The messages of a row."""

    location: str
    """The place of the row, such as "chats.jsonl:17"."""
    messages: tuple[Message, ...]
    """The messages, each with `role`, `content` and further fields of the row, such as `tool_calls`."""
    tools: Sequence[Any] | None = None
    """The functions that the assistant may call, as the row's field `tools` has them."""

    @property
    def key(self) -> str:
        """Equal for equal conversations."""
        return json.dumps(self.content, sort_keys=True)

    @property
    def content(self) -> list[Any]:
        """The fields but the location, as JSON values."""
        return [self.messages, self.tools]

    @classmethod
    def from_content(cls, location: str, content: list[Any]) -> Self:
        """The conversation whose `content` this is."""
        messages, tools = content
        return cls(location, tuple(messages), tools)

    @property
    def text(self) -> str:
        """The texts for training a new tokenizer."""
        return "\n".join(message["content"] for message in self.messages)

    @property
    def has_answer(self) -> bool:
        """True if the assistant says or calls something."""
        return any(message["role"] == "assistant" and not _is_empty(message) for message in self.messages)

    @property
    def has_empty_answer(self) -> bool:
        """True if an answer is empty, or if there is none."""
        return not self.has_answer or any(
            message["role"] == "assistant" and _is_empty(message) for message in self.messages
        )


def read_conversation(record: Record, data: DataSection) -> Conversation:
    """The conversation in a record's `messages` (role, content) or `conversations` (from, value).

    A text in the record's field `system` is its system message.

    Raises:
        UnusableRow: the record has no such field, or something else than messages in it.
    """
    field = data.messages_field or next((name for name in _LAYOUTS if name in record.fields), "messages")
    value = record.value(field)
    if isinstance(value, str):  # a column of JSON
        try:
            value = json.loads(value)
        except ValueError as error:
            raise record.unusable(f"field {field!r} is a string, but not JSON: {error}") from None
    if not isinstance(value, Sequence) or not value:
        raise record.unusable(f"field {field!r} is {_shown(value)}, not a list of messages")
    messages = tuple(_read_message(record, field, number, message) for number, message in enumerate(value, start=1))
    messages = _with_system_message(record, messages)
    tools = record.fields.get("tools", None)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise record.unusable(f"field 'tools' is a string, but not JSON: {error}") from None
    conversation = Conversation(record.location, messages, tools or None)
    try:
        json.dumps(conversation.content)
    except (TypeError, ValueError, RecursionError) as error:  # a table may have dates, numbers with units, bytes
        raise record.unusable(f"its messages or tools have a value that JSON does not have: {error}") from None
    return conversation


def conversation_of_pair(location: str, prompt: str, response: str) -> Conversation:
    """A turn of the user, and the assistant's answer."""
    return Conversation(
        location, ({"role": "user", "content": str(prompt)}, {"role": "assistant", "content": response})
    )


def encode_conversation(
    conversation: Conversation, tokenizer: Any, end: str, data: DataSection, spelled: SpelledTokens
) -> Row:
    """A row of token ids, in which the answers of the assistant, each with the token that ends it, are the labels.

    `end` is the `end_of_turn` of the tokenizer's chat template. `data.loss_on` chooses the answers. No labels are on an
    answer of weight 0 or, unless `data.empty_responses` keeps it, on an empty one.

    Raises:
        UnusableRow: the chat template cannot render the messages.
    """
    record = Record(conversation.location, {})
    messages = [
        {**message, "content": spelled.without_end(message["content"])} if message["role"] == "assistant" else message
        for message in conversation.messages
    ]
    if data.control_tokens == "text":
        _check_calls(record, messages, tokenizer)
    try:
        chat = render_chat(messages, tokenizer, end, conversation.tools)
    except ChatError as error:
        raise record.unusable(str(error)) from None
    spelled.in_prompt(chat.marked_text)
    segments = segments_of(chat)
    ids = encode_segments([text for text, _ in segments], tokenizer, parse=data.control_tokens == "parse")
    last = max((number for number, (_, is_answer) in enumerate(segments) if is_answer), default=-1)
    answers = [_is_learned(message, data) for message in messages if message["role"] == "assistant"]
    is_learned = iter(answers)
    input_ids: list[int] = []
    labels: list[int] = []
    prompt_length = 0
    for number, ((_, is_answer), segment) in enumerate(zip(segments, ids, strict=True)):
        is_label = data.loss_on == "all" or (is_answer and (data.loss_on == "response" or number == last))
        if is_answer:
            is_label &= next(is_learned)
        if is_answer and len(input_ids) < data.max_length:
            prompt_length = len(input_ids)
        input_ids += segment
        labels += segment if is_label else [IGNORED] * len(segment)
    return Row(conversation.location, input_ids, labels, prompt_length, unlearned_answers=answers.count(False))


def _shown(value: Any) -> str:
    """A value of a row as an error names it."""
    if value is None:
        return "null"
    return repr(value)[:40] if value or isinstance(value, int) else "empty"


def _is_empty(answer: Message) -> bool:
    return not answer["content"].strip() and not answer.get("tool_calls")


def _is_learned(answer: Message, data: DataSection) -> bool:
    """True if an answer of the assistant may have labels: a label on the end of an empty one teaches to say nothing."""
    is_wanted = all(answer.get(name, 1) for name in _TRAINED_FIELDS)
    return is_wanted and (data.empty_responses == "keep" or not _is_empty(answer))


def _with_system_message(record: Record, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages after the text of the record's field `system`, where it has one beside them."""
    if "system" not in record.fields or record.value("system") in (None, ""):
        return messages
    text = record.text("system")
    if messages[0]["role"] not in ("system", "developer"):
        return ({"role": "system", "content": text}, *messages)
    if messages[0]["content"] != text:
        raise record.unusable("it has a system message and another text in the field 'system': remove one of them")
    return messages


def _read_message(record: Record, field: str, number: int, message: Any) -> Message:
    where = f"message {number} of {field!r}"
    if not isinstance(message, Mapping):
        raise record.unusable(f"{where} is {_shown(message)}, not an object with a role and text")
    # Tables have null for the fields that a message lacks.
    given = {key: value for key, value in message.items() if value is not None}
    role_key, text_key = next((keys for keys in _LAYOUTS.values() if keys[0] in given), _LAYOUTS["messages"])
    if given.get(role_key) == _CALL_ROLE:
        calls = _calls_of_text(record, where, given.get(text_key))
        given = {role_key: "assistant", text_key: "", "tool_calls": calls}
    role = _ROLES.get(given.get(role_key, ""), given.get(role_key))
    if role not in _KNOWN_ROLES:
        allowed = ", ".join((*_KNOWN_ROLES, *_ROLES, _CALL_ROLE))
        raise record.unusable(f"{where} has the {role_key} {role!r}; expected one of {allowed}")
    others = {key: value for key, value in given.items() if key not in (role_key, text_key)}
    if "tool_calls" in others:
        others["tool_calls"] = _with_parsed_arguments(others["tool_calls"])
    if text_key not in given and not (role == "assistant" and "tool_calls" in others):
        problem = f"null as its {text_key}" if text_key in message else f"no {text_key}"
        raise record.unusable(f"{where} has {problem}: its fields are {', '.join(message) or 'none'}")
    for name in _TRAINED_FIELDS if role == "assistant" else ():
        if others.get(name, 1) not in (0, 1):
            expected = "0 or 1" if name == "weight" else "true or false"
            raise record.unusable(f"{where} has the {name} {others[name]!r}; expected {expected}")
    return {**others, "role": role, "content": _text(record, where, given.get(text_key, ""))}


def _calls_of_text(record: Record, where: str, text: Any) -> list[Any]:
    """The calls of functions in a text such as {"name": "add", "arguments": {"a": 2}}, or in a list of these."""
    try:
        content = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        content = None
    calls = content if isinstance(content, list) else [content]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise record.unusable(
            f'{where} is a {_CALL_ROLE} without a call such as {{"name": "add", "arguments": {{"a": 2}}}}: '
            f"{str(text)[:40]!r}"
        )
    return [{"type": "function", "function": call} for call in calls]


def _with_parsed_arguments(calls: Any) -> Any:
    """Calls of functions with their arguments as objects, as chat templates expect; APIs give the text of an object."""
    if isinstance(calls, Mapping):
        parsed = {key: _with_parsed_arguments(value) if key == "function" else value for key, value in calls.items()}
        if isinstance(arguments := calls.get("arguments"), str):
            with contextlib.suppress(ValueError, RecursionError):
                content = json.loads(arguments)
                parsed["arguments"] = content if isinstance(content, dict) else arguments
        return parsed
    if isinstance(calls, Sequence) and not isinstance(calls, str):
        return [_with_parsed_arguments(call) for call in calls]
    return calls


def _text(record: Record, where: str, content: Any) -> str:
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise record.unusable(f"{where} has parts that are not text: only text can be trained on")
        content = "".join(texts)
    return Record(f"{record.location}: {where}", {"content": content}, record.numbers).text("content")


def _check_calls(record: Record, messages: Sequence[Message], tokenizer: Any) -> None:
    """Refuse calls of functions that spell control tokens: the template would make tokens of them."""
    for number, message in enumerate(messages, start=1):
        found = control_token_pattern(tokenizer).search(json.dumps(message.get("tool_calls", ""), default=str))
        if found:
            raise record.unusable(
                f"message {number} calls a function with {found[0]!r}, which is a control token "
                "(data.control_tokens=parse reads it as the token)"
            )
