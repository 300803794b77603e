"""Saves a tokenizer's chat template only if it matches the training."""

from typing import Any

from utils.config.source_section import template_names
from utils.text.template import fill_template

_PROMPT = "\u2045prompt\u2046"


def is_chat_template(tokenizer: Any, template: str) -> bool:
    """True if a tokenizer's chat template renders one user message as `data.template` renders a prompt."""
    if template_names(template) != {"prompt"}:
        return False
    messages = [{"role": "user", "content": _PROMPT}]
    try:
        chat = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception:  # a template may refuse the messages in any way
        return False
    begin = tokenizer.bos_token or ""
    return chat.removeprefix(begin) == str(fill_template(template, {"prompt": _PROMPT})).removeprefix(begin)


def drop_other_chat_template(tokenizer: Any, template: str) -> bool:
    """Remove a chat template that training does not use: whoever asked the model with it would get gibberish."""
    if not tokenizer.chat_template or is_chat_template(tokenizer, template):
        return False
    tokenizer.chat_template = None
    return True
