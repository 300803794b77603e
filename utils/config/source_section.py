"""The keys of a data source, and the settings section `data.sources[]`."""

import string
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from utils.config.section import NonEmpty, PathText, Section

# Files by which a directory of `save_to_disk` is known: of a dataset, and of a dictionary of splits.
SAVED_DATASET = "state.json"
SAVED_SPLITS = "dataset_dict.json"


def is_saved_dataset(path: Path) -> bool:
    """True if a directory was written by `save_to_disk` of datasets."""
    return any((path / name).is_file() for name in (SAVED_DATASET, SAVED_SPLITS))


class SourceKeys(Section):
    """Where the rows come from, and which fields the run reads."""

    ALTERNATIVES: ClassVar[tuple[str, ...]] = ("docstrings", "summaries", "files", "hub")
    """The keys of which exactly one names where the rows come from."""

    docstrings: Annotated[list[NonEmpty], Field(min_length=1)] | None = None
    """Installed packages whose functions become pairs of signature with docstring -> body. `stdlib` is Python's
    standard library."""
    summaries: Annotated[list[NonEmpty], Field(min_length=1)] | None = None
    """Installed packages whose docstrings become pairs of text -> first line. `stdlib` is Python's standard library."""
    files: Annotated[list[PathText], Field(min_length=1)] | None = None
    """Local files: JSONL (also `.ndjson`), JSON, CSV, TSV, text (one row per line, field `text`) or Parquet.
    All formats except Parquet may be compressed (`.gz`, `.bz2`, `.xz`, `.zst`). A name may be a pattern such as
    `data/*.jsonl`, or a directory written by `save_to_disk`."""
    hub: PathText | None = None
    """A dataset on the Hugging Face Hub, or a local directory that `datasets` can load."""
    hub_configuration: NonEmpty | None = None
    """The configuration of a Hub dataset that has several, such as a version or a language."""
    split: NonEmpty = "train"
    """The split of a Hub dataset, or of a directory that `save_to_disk` wrote with several splits."""
    format: Literal["pairs", "chat"] = "pairs"
    """The content of a row: a prompt and a response, or a conversation, which the tokenizer's chat template renders."""
    messages_field: NonEmpty | None = None
    """The field with the messages of a conversation; null: `messages` or `conversations`. A message has `role` and
    `content`, or `from` and `value`. The chat template also receives the row's field `tools`."""
    prompt_field: NonEmpty | None = "prompt"
    """The field with the prompt; null: the rows have no prompt, as in plain text."""
    response_field: NonEmpty = "response"
    """The field with the response."""
    template: NonEmpty = "{prompt}"
    """The text before the response. `{prompt}` is the prompt field, and any other field may be named in
    braces; null becomes empty text. The template is saved with the model, and `generate.py` applies it."""

    def named_files(self) -> list[str]:
        """All files that the section names."""
        return self.files or []

    @field_validator("docstrings", "summaries", "files", mode="before")
    @classmethod
    def _wrap_single_name(cls, names: Any) -> Any:
        return [names] if isinstance(names, str) else names

    @model_validator(mode="after")
    def _exactly_one_source(self) -> Self:
        given = [name for name in self.ALTERNATIVES if getattr(self, name) is not None]
        if len(given) != 1:
            *others, last = self.ALTERNATIVES
            raise ValueError(f"give exactly one of {', '.join(others)} and {last}; given: {', '.join(given) or 'none'}")
        if self.hub_configuration is not None and self.hub is None:
            raise ValueError(
                f"hub_configuration is {self.hub_configuration!r}, but there is no hub: give hub, or leave it out"
            )
        has_splits = any((Path(name) / SAVED_SPLITS).is_file() for name in self.named_files())
        if self.split != "train" and self.hub is None and not has_splits:
            raise ValueError(
                f"split is {self.split!r}, but there is no hub, whose splits it names: give hub, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_source_keys(self) -> Self:
        if self.format == "pairs":
            if self.messages_field is not None:
                raise ValueError(f"messages_field is {self.messages_field!r}, which needs format: chat")
            return self
        for key in ("docstrings", "summaries"):
            if getattr(self, key) is not None:
                raise ValueError(f"format is 'chat', but {key} gives pairs: give files or hub, or leave format out")
        for key in ("prompt_field", "response_field", "template"):
            self.require_default(key)
        return self

    def require_default(self, key: str) -> None:
        """Refuse a key that the chat template decides."""
        if getattr(self, key) != type(self).model_fields[key].default:
            raise ValueError(
                f"{key} is {getattr(self, key)!r}, but format is 'chat', where the chat template decides: "
                "leave one of them out"
            )

    @model_validator(mode="after")
    def _check_prompt_field(self) -> Self:
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
    def _check_template(cls, template: str) -> str:
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

    @field_validator("files")
    @classmethod
    def _files_exist(cls, files: list[str] | None) -> list[str] | None:
        return existing_files(files)


class MixedSource(SourceKeys):
    """A source of a mix: exactly one of docstrings, summaries, files and hub, and its weight."""

    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often an epoch uses each training row of the source: 2 uses each row twice, 0.5 uses half of the rows, 2.5
    uses each row twice and half of them a third time. The seed selects that half, which is the same in every epoch."""


def existing_files(files: list[str] | None) -> list[str] | None:
    """Names of files; a pattern is replaced with the names that it matches.

    Raises:
        ValueError: there is no such file, or it is a directory that `save_to_disk` has not written.
    """
    if files is None:
        return None
    found: list[str] = []
    missing, directories = [], []
    for name in files:
        path = Path(name)
        matches = [name] if path.is_file() or is_saved_dataset(path) else _matches(name)
        usable = [match for match in matches if Path(match).is_file() or is_saved_dataset(Path(match))]
        found += usable
        if path.is_dir() and not usable:
            directories.append(name)
        elif not usable:
            missing.append(name)
    if directories:
        raise ValueError(
            f"{', '.join(directories)} is a directory, and not one of save_to_disk: give its files, for example "
            f"{Path(directories[0]) / '*.jsonl'}"
        )
    if missing:
        is_list = any("," in name for name in missing)
        several = "; write several files in brackets, as in [a.jsonl, b.jsonl]" if is_list else ""
        raise ValueError(f"there is no file {', '.join(missing)}{several}")
    return found


def _matches(pattern: str) -> list[str]:
    """The paths that a pattern such as `data/*.jsonl` matches, sorted."""
    path = Path(pattern)
    return sorted(map(str, Path(path.anchor).glob(str(path.relative_to(path.anchor)))))


def template_names(template: str) -> frozenset[str]:
    """The names in braces in a template."""
    return frozenset(name for _, name, _, _ in string.Formatter().parse(template) if name)
