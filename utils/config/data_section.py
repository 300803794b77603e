"""The settings section `data`."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from utils.config.section import NonEmpty, PathText, Positive
from utils.config.source_section import MixedSource, SourceKeys, existing_files

# What a source of a mix has from the section of the data if it does not say otherwise, by the source's format.
_INHERITED = {"pairs": ("prompt_field", "response_field", "template"), "chat": ("messages_field",)}


CHATML_NAME = "chatml"
"""The `chat_template` that is not a file."""


class DataSection(SourceKeys):
    """The training data: exactly one of docstrings, summaries, files, hub and sources."""

    ALTERNATIVES: ClassVar[tuple[str, ...]] = (*SourceKeys.ALTERNATIVES, "sources")

    sources: Annotated[list[MixedSource], Field(min_length=1)] | None = None
    """A mix of several sources, each with its own keys. A source inherits the fields and the template of `data` unless
    it sets its own. The template of `data` is saved with the model. With `format: chat`, a source of pairs
    gives conversations of two turns."""
    chat_template: PathText | None = None
    """A file with a Jinja chat template, or `chatml`, whose control tokens the tokenizer must have; null: the
    tokenizer's own template, or ChatML for a newly trained tokenizer."""
    control_tokens: Literal["text", "parse"] = "text"
    """How to tokenize the name of a control token, such as `<|im_end|>`, in a field: as plain text, or as the token.
    In the template, the name is always the token."""
    end_token: NonEmpty | None = None
    """The token that ends a response, such as `<|im_end|>`; null: the tokenizer's end-of-text token. The saved
    tokenizer and model use it as their end-of-text token."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """The maximum number of tokens per row; shorter rows are padded to this length."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """How to treat pairs with more tokens than `max_length`. A truncated pair has no end-of-text token."""
    duplicates: Literal["drop", "keep"] = "drop"
    """How to treat a pair that equals an earlier one. With `keep`, equal pairs are either all held out or all trained
    on."""
    empty_responses: Literal["drop", "keep", "refuse"] = "drop"
    """How to treat a pair with an empty response. Such a pair teaches the model to answer with nothing. In a
    conversation with other answers, `drop` only leaves out the label of the empty answer."""
    unusable: Literal["refuse", "skip"] = "refuse"
    """How to treat a row in which a field is missing, null or not text."""
    numbers: Literal["refuse", "text"] = "refuse"
    """How to treat a number in a field: as unusable, or as the text of its digits."""
    loss_on: Literal["response", "last", "all"] = "response"
    """The tokens with labels: the response and the end-of-text token, or the prompt as well (`all`).
    In a conversation, the response is every assistant turn with its end token, or only the last one (`last`)."""
    eval_rows: Positive | None = None
    """The number of rows held out for evaluation, drawn at random with the seed; null: a tenth, at most 200."""
    eval_files: Annotated[list[PathText], Field(min_length=1)] | None = None
    """Local files, like `files`, with rows for evaluation; no rows of the source are then held out. A source row that
    equals one of these rows is not trained on."""

    def each_source(self) -> list["DataSection"]:
        """The section as it is for each source of a mix, or for the one that there is."""
        if self.sources is None:
            return [self]
        return [
            self.model_copy(update={**{key: getattr(source, key) for key in SourceKeys.model_fields}, "sources": None})
            for source in self.sources
        ]

    def weights(self) -> list[float]:
        """The weight of each source."""
        return [1.0] if self.sources is None else [source.weight for source in self.sources]

    def named_files(self) -> list[str]:
        """All files that the section names, but those of a mix."""
        return [*(self.files or []), *(self.eval_files or [])]

    @field_validator("eval_files", mode="before")
    @classmethod
    def _wrap_single_file(cls, names: Any) -> Any:
        return [names] if isinstance(names, str) else names

    @model_validator(mode="before")
    @classmethod
    def _inherit_section_keys(cls, content: Any) -> Any:
        """The section with the keys written out that a source of a mix has from it."""
        if not (isinstance(content, dict) and isinstance(content.get("sources"), list)):
            return content
        return {**content, "sources": [_written_out(source, content) for source in content["sources"]]}

    @model_validator(mode="after")
    def _check_source_formats(self) -> Self:
        for number, source in enumerate(self.sources or []):
            if source.format == "chat" and self.format == "pairs":
                raise ValueError(
                    f"sources.{number} has format: chat, and the section data has format: pairs: give data.format: "
                    "chat, where a source of pairs gives conversations of two turns"
                )
            if source.format == "pairs" and self.format == "chat" and source.prompt_field is None:
                raise ValueError(
                    f"sources.{number} has prompt_field: null, but with data.format: chat its rows are to be "
                    "conversations, which begin with a prompt: name the field of it"
                )
        return self

    @model_validator(mode="after")
    def _check_held_out_rows(self) -> Self:
        if self.eval_files is not None and self.eval_rows is not None:
            raise ValueError(
                f"eval_rows is {self.eval_rows}, but all rows of eval_files are held out: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _check_format_keys(self) -> Self:
        if self.format == "chat":
            self.require_default("end_token")
            return self
        if self.chat_template is not None:
            raise ValueError(f"chat_template is {self.chat_template!r}, which needs format: chat")
        if self.loss_on == "last":
            raise ValueError("loss_on is 'last', which needs format: chat; a pair has one response")
        return self

    @field_validator("chat_template")
    @classmethod
    def _template_exists(cls, name: str | None) -> str | None:
        if name not in (None, CHATML_NAME) and not Path(name).is_file():
            raise ValueError(f"there is no file {name}: give {CHATML_NAME}, or a file with a chat template in Jinja")
        return name

    @field_validator("eval_files")
    @classmethod
    def _eval_files_exist(cls, files: list[str] | None) -> list[str] | None:
        return existing_files(files)


SOURCES = DataSection.ALTERNATIVES
"""The keys of which exactly one names where the data comes from."""


def _written_out(source: Any, data: dict[str, Any]) -> Any:
    if not isinstance(source, dict):
        return source
    gives_pairs = source.get("docstrings") is not None or source.get("summaries") is not None
    source = {"format": "pairs" if gives_pairs else data.get("format", "pairs"), **source}
    inherited = _INHERITED.get(str(source["format"]), ())
    return {**{key: data[key] for key in inherited if key in data}, **source}
