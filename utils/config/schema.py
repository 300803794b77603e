"""The settings of a run: every key, its type, its default and what it allows. `config_file` reads them from YAML."""

import dataclasses
import string
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, create_model, field_validator, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from moreh import options
from moreh.options import MAX_WORKERS, did_you_mean

NonEmpty = Annotated[str, StringConstraints(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Auto = Literal["auto"]


class Section(BaseModel):
    """A part of the settings. Unknown keys are refused, and values are not converted from other types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _problem_of_key(key: str, message: str) -> PydanticCustomError:
    """An error of one key below the field that is being validated."""
    return PydanticCustomError("problem_of_key", "{message}", {"key": key, "message": message})


class RunSection(Section):
    """Where the run leaves what it makes."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Everything is written to `<directory>/<name>/`."""
    directory: NonEmpty = "runs"
    cache_directory: NonEmpty = ".cache"
    """Tokenizers and tokenized data are kept here and used again by later runs."""
    tensorboard: bool = False
    """Also write TensorBoard event files; needs the package `tensorboard`."""


# What the hook's options allow, as types of pydantic.
_OPTION_TYPES: dict[str, Any] = {
    options.SWITCH: bool,
    options.SWITCH_OR_AUTO: bool | Auto,
    options.COUNT_OR_AUTO: Positive | Auto,
    options.NAMES: list[Literal[tuple(options.OPTIMIZATIONS)]],  # type: ignore[misc]
}


def _declared_option(option: dataclasses.Field[Any]) -> tuple[Any, Any]:
    default = list(option.default) if isinstance(option.default, tuple) else option.default
    return _OPTION_TYPES[option.metadata["allowed"]], Field(default, description=option.metadata["doc"])


_DECLARED: dict[str, Any] = {
    option.name: _declared_option(option) for option in dataclasses.fields(options.ParallelOptions)
}
_Options: Any = create_model("_Options", __base__=Section, **_DECLARED)


class ParallelizationSection(_Options):  # type: ignore[misc]
    """The options of `torch.moreh.option.enable_advanced_parallelization`, which are declared in moreh/options.py."""

    def options(self) -> options.ParallelOptions:
        """The options as the hook takes them."""
        return options.parse_options(self.model_dump())

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        self.options()  # its OptionError is a ValueError
        return self


class AcceleratorSection(Section):
    """The accelerator that the run uses."""

    model: NonEmpty | Positive | None = None
    """Switch the current accelerator to this model first, by name or number; null leaves it as it is."""
    workers: Annotated[int, Field(ge=1, le=MAX_WORKERS)] | None = None
    """Processes that compute; null: as many as the machine has GPUs, else one. The variable MOREH_WORKERS goes before it."""
    advanced_parallelization: ParallelizationSection | None = ParallelizationSection()
    """null: the hook is not called, and the model lives on one physical device in full precision."""

    @model_validator(mode="after")
    def _workers_need_the_hook(self) -> Self:
        if self.workers not in (None, 1) and self.advanced_parallelization is None:
            raise ValueError(
                f"workers is {self.workers} but advanced_parallelization is null, without which there is one: "
                "leave workers out, or give advanced_parallelization its keys (or {})"
            )
        return self


class ModelSection(Section):
    """The model: exactly one of the two keys."""

    pretrained: NonEmpty | None = None
    """A model of the hub or a local directory; its own tokenizer is used."""
    architecture: dict[str, Any] | None = None
    """A new model with random weights: `model_type` and the keys of that type's configuration in transformers."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.pretrained is None) == (self.architecture is None):
            raise ValueError("give exactly one of pretrained and architecture")
        return self

    @field_validator("pretrained")
    @classmethod
    def _directory_exists(cls, pretrained: str | None) -> str | None:
        """What can only be a path is not looked for on the hub, where its error would be about names."""
        if pretrained is not None and pretrained.startswith((".", "/")) and not Path(pretrained).is_dir():
            raise ValueError(
                f"there is no directory {pretrained}: give one that holds a model, or the name of one on the hub"
            )
        return pretrained

    @field_validator("architecture")
    @classmethod
    def _known_keys(cls, architecture: dict[str, Any] | None) -> dict[str, Any] | None:
        """transformers accepts any key without a word, so a typing error would train with a default."""
        if architecture is None:
            return None
        from transformers import CONFIG_MAPPING

        model_type = str(architecture.get("model_type"))
        if model_type not in CONFIG_MAPPING:
            meant = did_you_mean(model_type, CONFIG_MAPPING.keys())
            raise _problem_of_key("model_type", f"{model_type!r} is not a type that transformers knows{meant}")
        known = set(CONFIG_MAPPING[model_type]().to_dict()) | set(CONFIG_MAPPING[model_type].attribute_map)
        unknown = [key for key in architecture if key not in known]
        if unknown:
            others = f" (nor {', '.join(unknown[1:])})" if len(unknown) > 1 else ""
            meant = did_you_mean(unknown[0], known)
            raise _problem_of_key(unknown[0], f"model_type {model_type} has no such key{others}{meant}")
        return architecture


class TokenizerSection(Section):
    """The tokenizer of a new model."""

    pretrained: NonEmpty | None = None
    """A tokenizer of the hub or a local directory; null trains a byte-level BPE tokenizer on the data."""
    vocabulary_size: Annotated[int, Field(ge=300, le=1_000_000)] = 4096
    """Entries of a tokenizer that is trained, the 256 bytes and the end-of-text token among them."""


class DataSection(Section):
    """The pairs to learn: exactly one of docstrings, summaries, files and hub."""

    docstrings: Annotated[list[NonEmpty], Field(min_length=1)] | None = None
    """Installed packages whose sources give pairs of signature with docstring -> body; `stdlib` is Python's library."""
    summaries: Annotated[list[NonEmpty], Field(min_length=1)] | None = None
    """Installed packages, likewise, whose docstrings give pairs of their text without the first line -> that line."""
    files: Annotated[list[NonEmpty], Field(min_length=1)] | None = None
    """Local JSONL, JSON, CSV or Parquet files."""
    hub: NonEmpty | None = None
    """A data set of the hub."""
    hub_configuration: NonEmpty | None = None
    """Which configuration of the hub's data set, where it has several, such as a version or a language."""
    split: NonEmpty = "train"
    """The split of the hub's data set."""
    prompt_field: NonEmpty = "prompt"
    response_field: NonEmpty = "response"
    template: NonEmpty = "{prompt}"
    """The text before the response. `{prompt}` is the prompt field; any other field may be named in braces too."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Tokens of a row; each row is padded to it."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """What becomes of pairs with more tokens than that. A truncated one has no end-of-text token."""
    loss_on: Literal["response", "all"] = "response"
    """The tokens that are labels: the response's and the end of text, or the prompt's too."""
    eval_rows: Positive = 200
    """Rows held out of training for evaluation, chosen at random with the seed."""

    @model_validator(mode="after")
    def _exactly_one_source(self) -> Self:
        given = [name for name in ("docstrings", "summaries", "files", "hub") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of docstrings, summaries, files and hub; given: {', '.join(given) or 'none'}"
            )
        if self.hub_configuration is not None and self.hub is None:
            raise ValueError(
                f"hub_configuration is {self.hub_configuration!r} but there is no hub: give hub, or leave it out"
            )
        if self.split != "train" and self.hub is None:
            raise ValueError(
                f"split is {self.split!r} but there is no hub, whose splits it names: give hub, or leave it out"
            )
        return self

    @field_validator("template")
    @classmethod
    def _names_prompt(cls, template: str) -> str:
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ValueError(f"{template!r} is not a template: {error} (a brace itself is written twice)") from None
        for _, name, specification, conversion in parts:
            if name is not None and (not name.isidentifier() or specification or conversion):
                raise ValueError(
                    f"{template!r}: only names of fields may stand in braces (a brace itself is written twice)"
                )
        if "prompt" not in {name for _, name, _, _ in parts}:
            raise ValueError("the template must contain {prompt}")
        return template

    @field_validator("files")
    @classmethod
    def _files_exist(cls, files: list[str] | None) -> list[str] | None:
        missing = [name for name in files or [] if not Path(name).is_file()]
        if missing:
            raise ValueError(f"there is no file {', '.join(missing)}")
        return files


class TrainSection(Section):
    """The training loop."""

    steps: Positive | None = None
    """Optimizer steps; exactly one of steps and epochs."""
    epochs: Positive | None = None
    batch_size: Positive = 16
    """Rows of a forward pass."""
    gradient_accumulation: Positive = 1
    """Forward passes of an optimizer step. Each label token counts the same, however the rows are cut into batches."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """The highest learning rate, after the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: NotNegative = 0
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The learning rate at the last step, as a part of lr, where the schedule lets it fall."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global norm."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    loader_workers: NotNegative = 0
    """Processes that prepare batches in the background."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if self.steps is not None and self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps} but there are only {self.steps} steps")
        return self


class CheckpointSection(Section):
    """States of the training, from which `--resume` goes on."""

    every_steps: Positive | None = None
    """Write one every so many steps; null: only when the run is stopped by SIGTERM."""
    keep_last: Positive = 2
    """Older ones are removed."""
    resume: NonEmpty | None = None
    """Go on from a checkpoint, as --resume: the directory of a run or of one of its checkpoints; auto is the last one of
    this run, or a new start if it has none."""


class LogSection(Section):
    """What is told while the run goes on."""

    every_steps: Positive = 10
    """A line on the console; metrics.jsonl has every step."""
    eval_every_steps: Positive | None = None
    """Evaluate on the held-out rows and show a sample; always done before the first and after the last step."""
    eval_batch_size: Positive | None = None
    """Rows of a forward pass in evaluation; null: as in training. The result does not depend on it."""
    sample_tokens: NotNegative = 64
    """Tokens of the sample that each evaluation generates from a held-out prompt; 0: none."""


class Config(Section):
    """All settings of a run."""

    run: RunSection
    accelerator: AcceleratorSection = AcceleratorSection()
    model: ModelSection
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataSection
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _tokenizer_comes_with_model(self) -> Self:
        if self.model.pretrained is not None and self.tokenizer != TokenizerSection():
            raise ValueError(
                "model.pretrained brings its own tokenizer: leave the section tokenizer out (or say tokenizer={})"
            )
        return self
