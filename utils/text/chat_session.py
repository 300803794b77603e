"""An interactive conversation with a model: one message per line."""

import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from utils.errors import UserError
from utils.text.chat import encode_segments, prompt_for_answer

RESET = "/reset"
"""The line that forgets the conversation."""

# Token ids of a prompt -> token ids of the answer, which is written meanwhile.
Generate = Callable[[list[int]], list[int]]


def chat(lines: Iterable[str], generate: Generate, tokenizer: Any, system: str | None = None) -> None:
    """Answer each line, with the earlier ones and their answers before it; the speed goes to standard error.

    Raises:
        UserError: the chat template refuses the messages.
    """
    beginning = [] if system is None else [{"role": "system", "content": system}]
    messages = list(beginning)
    for line in lines:
        text = line.strip()
        if text == RESET:
            messages = list(beginning)
            _say("The conversation begins anew.")
        elif text:
            messages.append({"role": "user", "content": text})
            try:
                messages.append({"role": "assistant", "content": _answer(messages, generate, tokenizer)})
            except UserError as error:
                messages.pop()
                if len(messages) == len(beginning):  # the first message already: nothing to forget would help
                    raise
                _say(f"error: {error}\n({RESET} begins a new conversation)")


def encode_chat_prompt(messages: list[dict[str, Any]], tokenizer: Any) -> list[int]:
    """Token ids of a conversation up to where the assistant answers; control tokens in messages are text."""
    (ids,) = encode_segments([prompt_for_answer(messages, tokenizer)], tokenizer, parse=False)
    return ids


def _answer(messages: list[dict[str, Any]], generate: Generate, tokenizer: Any) -> str:
    prompt_ids = encode_chat_prompt(messages, tokenizer)
    started = time.perf_counter()
    ids = generate(prompt_ids)
    seconds = time.perf_counter() - started
    has_ended = ids[-1:] == [tokenizer.eos_token_id]
    _say(f"[{len(ids)} tokens, {len(ids) / seconds:.1f} tokens/s{'' if has_ended else ', cut at --max-new-tokens'}]")
    from utils.text.decoding import decode_answer  # imports transformers

    return decode_answer(ids, tokenizer)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
