"""The settings of a run: every key, its type, its default and what it allows.

`yaml_file` reads them, and `markdown` writes docs/configuration.md from these declarations and their docstrings.
"""

import string
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator
from typing_extensions import Self

from moreh.options import MAX_WORKERS
from utils.config.architecture_keys import check_architecture_keys
from utils.config.hook_section import ParallelizationSection
from utils.config.section import NonEmpty, NotNegative, Positive, Section


class RunSection(Section):
    """Where the run writes its files."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Everything is written to `<directory>/<name>/`; an earlier run of that name is kept as `<name>.1`."""
    directory: NonEmpty = "runs"
    """The directory of all runs."""
    cache_directory: NonEmpty = ".cache"
    """Tokenizers and tokenized data are kept here and reused by later runs."""
    tensorboard: bool = False
    """Also write TensorBoard event files; needs the package `tensorboard`."""


class AcceleratorSection(Section):
    """The accelerator that the run uses."""

    model: NonEmpty | Positive | None = None
    """Switch the current accelerator to this model first, given by name or number; null leaves it as it is."""
    workers: Annotated[int, Field(ge=1, le=MAX_WORKERS)] | None = None
    """The number of processes that compute; null: one for each GPU, or one. The variable MOREH_WORKERS overrides it."""
    advanced_parallelization: ParallelizationSection | None = ParallelizationSection()
    """The options of the one line; null: train as if the line were not there, on one device in full precision."""

    def options(self) -> dict[str, Any]:
        """The arguments of `enable_advanced_parallelization`: the options that are not left at their defaults."""
        section = self.advanced_parallelization
        return {} if section is None else section.model_dump(exclude_defaults=True)

    @model_validator(mode="after")
    def _workers_need_the_hook(self) -> Self:
        if self.workers not in (None, 1) and self.advanced_parallelization is None:
            raise ValueError(
                f"workers is {self.workers}, but advanced_parallelization is null, and without it there is one worker: "
                "leave workers out, or give advanced_parallelization its keys (or {})"
            )
        return self


class ModelSection(Section):
    """The model: exactly one of the two keys."""

    pretrained: NonEmpty | None = None
    """A model of the Hugging Face hub or a local directory; its own tokenizer is used."""
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
        """Refuse a path that is not there. The hub would answer with an error about repository names."""
        if pretrained is not None and pretrained.startswith((".", "/")) and not Path(pretrained).is_dir():
            raise ValueError(
                f"there is no directory {pretrained}: give one that holds a model, or the name of one on the hub"
            )
        return pretrained

    @field_validator("architecture")
    @classmethod
    def _known_keys(cls, architecture: dict[str, Any] | None) -> dict[str, Any] | None:
        if architecture is not None:
            check_architecture_keys(architecture)
        return architecture


class TokenizerSection(Section):
    """The tokenizer of a new model."""

    pretrained: NonEmpty | None = None
    """A tokenizer of the hub or a local directory; null trains a byte-level BPE tokenizer on the data."""
    vocabulary_size: Annotated[int, Field(ge=300, le=1_000_000)] = 4096
    """Entries of a tokenizer that is trained, including the 256 bytes and the end-of-text token."""


class DataSection(Section):
    """The prompt-response pairs to learn: exactly one of docstrings, summaries, files and hub."""

    docstrings: Annotated[list[NonEmpty], Field(min_length=1)] | None = None
    """Installed packages whose sources give pairs of signature with docstring -> body; `stdlib` is Python's library."""
    summaries: Annotated[list[NonEmpty], Field(min_length=1)] | None = None
    """Installed packages whose docstrings give pairs of text -> first line; `stdlib` is Python's library."""
    files: Annotated[list[NonEmpty], Field(min_length=1)] | None = None
    """Local JSONL, JSON, CSV or Parquet files."""
    hub: NonEmpty | None = None
    """A dataset of the Hugging Face hub."""
    hub_configuration: NonEmpty | None = None
    """The configuration of the hub's dataset where it has several, such as a version or a language."""
    split: NonEmpty = "train"
    """The split of the hub's dataset."""
    prompt_field: NonEmpty = "prompt"
    """The field of a row that is the prompt."""
    response_field: NonEmpty = "response"
    """The field of a row that is the response."""
    template: NonEmpty = "{prompt}"
    """The text before the response. `{prompt}` is the prompt field; other fields may be named in braces as well."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Tokens of a row; each row is padded to it."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """What happens to pairs with more tokens than `max_length`. A truncated one has no end-of-text token."""
    loss_on: Literal["response", "all"] = "response"
    """The tokens that are labels: those of the response and the end of text, or those of the prompt as well."""
    eval_rows: Positive = 200
    """Rows held out of training for evaluation, chosen at random with the seed."""

    @model_validator(mode="after")
    def _exactly_one_source(self) -> Self:
        sources = [name for name in ("docstrings", "summaries", "files", "hub") if getattr(self, name) is not None]
        if len(sources) != 1:
            raise ValueError(
                f"give exactly one of docstrings, summaries, files and hub; given: {', '.join(sources) or 'none'}"
            )
        if self.hub_configuration is not None and self.hub is None:
            raise ValueError(
                f"hub_configuration is {self.hub_configuration!r}, but there is no hub: give hub, or leave it out"
            )
        if self.split != "train" and self.hub is None:
            raise ValueError(
                f"split is {self.split!r}, but there is no hub, whose splits it names: give hub, or leave it out"
            )
        return self

    @field_validator("template")
    @classmethod
    def _names_prompt(cls, template: str) -> str:
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ValueError(f"{template!r} is not a template: {error} (double a brace that is text)") from None
        for _, name, specification, conversion in parts:
            if name is not None and (not name.isidentifier() or specification or conversion):
                raise ValueError(f"{template!r}: only names of fields may be in braces (double a brace that is text)")
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
    """Passes over the training rows; exactly one of steps and epochs."""
    batch_size: Positive = 16
    """Rows of a forward pass."""
    gradient_accumulation: Positive = 1
    """Forward passes of an optimizer step. Each label token counts the same, however the rows are cut into batches."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """The highest learning rate, reached at the end of the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: NotNegative = 0
    """Steps over which the learning rate rises; the first one already learns."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The learning rate of the last step, as a fraction of `lr`; a constant schedule ignores it."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this global norm."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides the held-out rows, the order of the data, the weights of a new model and dropout."""
    loader_workers: NotNegative = 0
    """Processes that prepare batches in the background."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if self.steps is not None and self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, but there are only {self.steps} steps")
        return self


class CheckpointSection(Section):
    """Checkpoints of the training, from which `--resume` continues."""

    every_steps: Positive | None = None
    """Save a checkpoint every so many steps; null: only when the run is stopped by SIGTERM."""
    keep_last: Positive = 2
    """The number of checkpoints to keep; older ones are removed."""
    resume: NonEmpty | None = None
    """What `--resume` resumes: `auto` (the last checkpoint of the run, if any), or the directory of one or of a run."""


class LogSection(Section):
    """What a run reports."""

    every_steps: Positive = 10
    """Steps between two lines on the console; metrics.jsonl has every step."""
    eval_every_steps: Positive | None = None
    """Steps between two evaluations on the held-out rows. The first is before the training, the last after it."""
    eval_batch_size: Positive | None = None
    """Rows of a forward pass in evaluation; null: as in training. The result does not depend on it."""
    sample_tokens: NotNegative = 64
    """Tokens of the sample that each evaluation generates from a held-out prompt; 0: no sample."""


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
