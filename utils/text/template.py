"""The prompt template: filled with the fields of a row, saved with the model, and applied to prompts."""

import json
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from typing_extensions import Self

from utils.config.data_section import DataSection
from utils.config.source_section import template_names
from utils.errors import UserError

FILE_NAME = "prompt_template.json"
_CHAT = {"format": "chat"}


class FilledPrompt(str):
    """A text in which some parts came from fields: in those, the name of a control token is text."""

    fields: tuple[tuple[int, int], ...]
    """The start and end of each part from a field, in characters."""

    def __new__(cls, text: str, fields: tuple[tuple[int, int], ...]) -> Self:  # noqa: D102
        filled = super().__new__(cls, text)
        filled.fields = fields
        return filled


def fill_template(template: str, values: Mapping[str, str]) -> FilledPrompt:
    """A template such as "Question: {prompt}" with a value for each name in braces.

    >>> str(fill_template("Question: {prompt}", {"prompt": "Two and two?"}))
    'Question: Two and two?'
    """
    text, fields = "", []
    for literal, name, _, _ in string.Formatter().parse(template):
        text += literal
        if name is not None:
            fields.append((len(text), len(text) + len(values[name])))
            text += values[name]
    return FilledPrompt(text, tuple(fields))


@dataclass(frozen=True)
class PromptTemplate:
    """The prompt template of a model's training."""

    template: str
    """`data.template`."""
    control_tokens: Literal["text", "parse"]
    """`data.control_tokens`."""

    @property
    def other_fields(self) -> list[str]:
        """The names in the template besides `prompt`, sorted."""
        return sorted(template_names(self.template) - {"prompt"})

    def is_applied_to(self, prompt: str) -> bool:
        """True if a prompt already begins and ends as the template does."""
        parts = [literal for literal, _, _, _ in string.Formatter().parse(self.template + "{end}")]
        begin, end = parts[0], parts[-1]
        return bool(begin or end) and prompt.startswith(begin) and prompt.endswith(end)

    def fill(self, prompt: str, fields: Mapping[str, str]) -> str:
        """The text that the model was trained to answer; fields that are not given are empty.

        Raises:
            UserError: the template has no field of a given name.
        """
        for name in fields:
            if name not in self.other_fields:
                allowed = ", ".join(self.other_fields) or "none besides the prompt"
                raise UserError(f"--field {name}: the model's template has no such field; it has {allowed}")
        values = dict.fromkeys(self.other_fields, "") | dict(fields) | {"prompt": prompt}
        filled = fill_template(self.template, values)
        return str(filled) if self.control_tokens == "parse" else filled


def save_template(data: DataSection, directory: Path) -> None:
    """Save the template of a run with its model, for `generate.py`. A chat template is saved with the tokenizer."""
    if data.format == "chat":
        (directory / FILE_NAME).write_text(json.dumps(_CHAT) + "\n", encoding="utf-8")
        return
    saved = PromptTemplate(data.template, data.control_tokens)
    (directory / FILE_NAME).write_text(json.dumps(asdict(saved), indent=2) + "\n", encoding="utf-8")


def _checked(template: PromptTemplate) -> PromptTemplate:
    """The template as `data.template` allows it.

    Raises:
        ValueError: a value is of another type, or is not a template of a prompt.
    """
    if not isinstance(template.template, str) or template.control_tokens not in ("text", "parse"):
        raise ValueError(f"{template} is not allowed")
    if "prompt" not in template_names(template.template):
        raise ValueError("the template must contain {prompt}")
    return template


def load_template(name: str) -> PromptTemplate | Literal["chat"] | None:
    """The template that is saved with a model, or "chat" where that is the tokenizer's chat template.

    None for a model that this project has not trained.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(name) / FILE_NAME
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return "chat" if saved == _CHAT else _checked(PromptTemplate(**saved))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not the template of a prompt: {error}; give --raw, or repair the file") from None
