"""The section of the data: its keys, and which of them agree with each other."""

import string
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from utils.config.section import NonEmpty, PathText, Positive, Section

SOURCES = ("docstrings", "summaries", "files", "hub")
"""The keys of which exactly one names where the data comes from."""
# Files by which a directory of `save_to_disk` is known: of a dataset, and of a dictionary of splits.
SAVED_DATASET = "state.json"
SAVED_SPLITS = "dataset_dict.json"


def is_saved_dataset(path: Path) -> bool:
    """Whether a directory was written by `save_to_disk` of datasets."""
    return any((path / name).is_file() for name in (SAVED_DATASET, SAVED_SPLITS))


class DataSection(Section):
    """The pairs or conversations to learn: exactly one of docstrings, summaries, files and hub."""

    docstrings: Annotated[list[NonEmpty], Field(min_length=1)] | None = None
    """Installed packages whose sources give pairs of signature with docstring -> body; `stdlib` is Python's library."""
    summaries: Annotated[list[NonEmpty], Field(min_length=1)] | None = None
    """Installed packages whose docstrings give pairs of text -> first line; `stdlib` is Python's library."""
    files: Annotated[list[PathText], Field(min_length=1)] | None = None
    """Local files: JSONL (also `.ndjson`), JSON, CSV, TSV, text (a row a line, field `text`) or Parquet; all but
    Parquet may be compressed (`.gz`, `.bz2`, `.xz`, `.zst`). A name may be a pattern such as `data/*.jsonl`, or a
    directory of `save_to_disk`."""
    hub: PathText | None = None
    """A dataset of the Hugging Face hub, or a local directory that `datasets` can load."""
    hub_configuration: NonEmpty | None = None
    """The configuration of the hub's dataset where it has several, such as a version or a language."""
    split: NonEmpty = "train"
    """The split of the hub's dataset, or of a directory that `save_to_disk` has written with several."""
    format: Literal["pairs", "chat"] = "pairs"
    """What a row holds: a prompt and a response, or a conversation, which the tokenizer's chat template renders."""
    messages_field: NonEmpty | None = None
    """The field of a row that holds the messages of a conversation; null: `messages` or `conversations`. A message has
    a `role` and a `content`, or a `from` and a `value`. The row's field `tools` is given to the template."""
    chat_template: PathText | None = None
    """A file with a chat template in Jinja; null: the one of the tokenizer, or ChatML where a tokenizer is trained."""
    prompt_field: NonEmpty | None = "prompt"
    """The field of a row that is the prompt; null: there is none, as with a column of plain texts."""
    response_field: NonEmpty = "response"
    """The field of a row that is the response."""
    template: NonEmpty = "{prompt}"
    """The text before the response. `{prompt}` is the prompt field; other fields may be named in braces as well, and
    are empty where a row has null. It is saved with the model, and `generate.py` applies it."""
    control_tokens: Literal["text", "parse"] = "text"
    """How the name of a control token, such as `<|im_end|>`, is read in a field: as text, or as the token. In the
    template it is the token."""
    end_token: NonEmpty | None = None
    """The token that ends a response, such as `<|im_end|>`; null: the tokenizer's end-of-text token. The saved
    tokenizer and model have it as theirs."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Tokens of a row; each row is padded to it."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """What happens to pairs with more tokens than `max_length`. A truncated one has no end-of-text token."""
    duplicates: Literal["drop", "keep"] = "drop"
    """What happens to a pair that is equal to an earlier one. Those kept are all held out, or all trained on."""
    empty_responses: Literal["drop", "keep", "refuse"] = "drop"
    """What happens to a pair whose response is empty. One that is kept teaches to say nothing."""
    unusable: Literal["refuse", "skip"] = "refuse"
    """What happens to a row that lacks a field, or has null or something else that is no text in it."""
    numbers: Literal["refuse", "text"] = "refuse"
    """Whether a number in a field is unusable, or the text of its digits."""
    loss_on: Literal["response", "last", "all"] = "response"
    """The tokens that are labels: those of the response and the end of text, or those of the prompt as well (`all`).
    In a conversation, a response is each turn of the assistant, with the token that ends it; `last`: only the last."""
    eval_rows: Positive | None = None
    """Rows held out of training for evaluation, chosen at random with the seed; null: a tenth, at most 200."""
    eval_files: Annotated[list[PathText], Field(min_length=1)] | None = None
    """Local files, like `files`, whose rows are held out in place of rows of the source. A row of the source that is
    equal to one of these is not trained on."""

    @field_validator("docstrings", "summaries", "files", "eval_files", mode="before")
    @classmethod
    def _one_name_is_a_list_of_one(cls, names: Any) -> Any:
        return [names] if isinstance(names, str) else names

    @model_validator(mode="after")
    def _exactly_one_source(self) -> Self:
        sources = [name for name in SOURCES if getattr(self, name) is not None]
        if len(sources) != 1:
            raise ValueError(
                f"give exactly one of docstrings, summaries, files and hub; given: {', '.join(sources) or 'none'}"
            )
        if self.hub_configuration is not None and self.hub is None:
            raise ValueError(
                f"hub_configuration is {self.hub_configuration!r}, but there is no hub: give hub, or leave it out"
            )
        has_splits = any(
            (Path(name) / SAVED_SPLITS).is_file() for name in [*(self.files or []), *(self.eval_files or [])]
        )
        if self.split != "train" and self.hub is None and not has_splits:
            raise ValueError(
                f"split is {self.split!r}, but there is no hub, whose splits it names: give hub, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _held_out_rows_are_named_once(self) -> Self:
        if self.eval_files is not None and self.eval_rows is not None:
            raise ValueError(
                f"eval_rows is {self.eval_rows}, but all rows of eval_files are held out: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _keys_are_of_the_format(self) -> Self:
        if self.format == "pairs":
            for key in ("messages_field", "chat_template"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} is {getattr(self, key)!r}, which needs format: chat")
            if self.loss_on == "last":
                raise ValueError("loss_on is 'last', which needs format: chat; a pair has one response")
            return self
        for key in ("docstrings", "summaries"):
            if getattr(self, key) is not None:
                raise ValueError(f"format is 'chat', but {key} gives pairs: give files or hub, or leave format out")
        for key in ("prompt_field", "response_field", "template", "end_token"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} is {getattr(self, key)!r}, but format is 'chat', where the chat template decides: "
                    "leave one of them out"
                )
        return self

    @field_validator("chat_template")
    @classmethod
    def _template_exists(cls, name: str | None) -> str | None:
        if name is not None and not Path(name).is_file():
            raise ValueError(f"there is no file {name}: give one that holds a chat template in Jinja")
        return name

    @model_validator(mode="after")
    def _prompt_is_not_the_response(self) -> Self:
        """A prompt that shows the answer teaches to copy, and its held-out loss is next to 0."""
        if self.prompt_field == self.response_field:
            raise ValueError(f"prompt_field and response_field are both {self.response_field!r}: name two fields")
        if self.response_field in template_names(self.template) - {"prompt"}:
            raise ValueError(
                f"the template names {{{self.response_field}}}, which is the response: the model would be shown the "
                "answer; leave it out, since the response follows the template anyway"
            )
        return self

    @field_validator("template")
    @classmethod
    def _names_prompt(cls, template: str) -> str:
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ValueError(f"{template!r} is not a template: {error} (double a brace that is text)") from None
        if any(
            name is not None and (not name.strip() or format_ or conversion) for _, name, format_, conversion in parts
        ):
            raise ValueError(f"{template!r}: only names of fields may be in braces (double a brace that is text)")
        if "prompt" not in template_names(template):
            raise ValueError("the template must contain {prompt}")
        return template

    @field_validator("files", "eval_files")
    @classmethod
    def _files_exist(cls, files: list[str] | None) -> list[str] | None:
        """The files, with the names that a pattern stands for in its place."""
        if files is None:
            return None
        found, missing = [], []
        for name in files:
            path = Path(name)
            matches = [name] if path.is_file() or is_saved_dataset(path) else _matches(name)
            usable = [match for match in matches if Path(match).is_file() or is_saved_dataset(Path(match))]
            found += usable
            missing += [] if usable else [name]
        if missing:
            raise ValueError(f"there is no file {', '.join(missing)}")
        return found


def _matches(pattern: str) -> list[str]:
    """The paths that a pattern such as `data/*.jsonl` stands for, sorted."""
    path = Path(pattern)
    return sorted(map(str, Path(path.anchor).glob(str(path.relative_to(path.anchor)))))


def template_names(template: str) -> frozenset[str]:
    """The names in braces in a template."""
    return frozenset(name for _, name, _, _ in string.Formatter().parse(template) if name)
