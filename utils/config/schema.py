"""The settings of a run: every key with its type, default and allowed values.

`yaml_file` reads them, and `markdown` writes docs/configuration.md from these declarations and their docstrings.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, ValidationInfo, field_validator, model_validator
from typing_extensions import Self

from moreh.options import MAX_WORKERS
from utils.config.data_section import SOURCES
from utils.config.data_section import DataSection as DataSection
from utils.config.hook_section import ParallelizationSection
from utils.config.model_section import ADAPTER_FILE as ADAPTER_FILE
from utils.config.model_section import LoraSection as LoraSection
from utils.config.model_section import ModelSection as ModelSection
from utils.config.optimizers import check_optimizer_settings
from utils.config.running_section import CheckpointSection as CheckpointSection
from utils.config.running_section import LaunchSection, StopSection
from utils.config.section import NonEmpty, NotNegative, PathText, Positive, Section

EXCLUSIVE_KEYS = {"data": SOURCES, "model": ("pretrained", "architecture"), "train": ("steps", "epochs")}
"""Keys of a section of which exactly one is given. One on the command line takes the place of another in the file."""
RESUME_WITH_KEYS = tuple(
    f"train.{key}"
    for key in (
        "lr",
        "schedule",
        "warmup_steps",
        "decay_steps",
        "decay_shape",
        "min_lr_ratio",
        "weight_decay",
        "max_grad_norm",
    )
)
"""Settings that `--resume-with` may change."""
RESUME_KEYS = ("resume", "resume_with", "resume_force")
"""Keys of the section checkpoint that are about one start of a run. Its `config.yaml` does not have them."""


def _not_none(name: str) -> str:
    if name.lower() == "none":
        raise ValueError(f"{name!r} reads like no name at all: give another one")
    return name


class RunSection(Section):
    """Where the run writes its files."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"), AfterValidator(_not_none)]
    """The run writes its files to `<directory>/<name>/`; an earlier run with that name is renamed to `<name>.1`."""
    directory: PathText = "runs"
    """The parent directory of all runs."""
    cache_directory: PathText = ".cache"
    """The directory for tokenizers and tokenized data, which later runs reuse."""
    tensorboard: bool = False
    """Adds `tensorboard` to `log.trackers`."""


class AcceleratorSection(Section):
    """The accelerator that the run uses."""

    model: NonEmpty | Positive | None = None
    """The flavor to switch the current accelerator to, by name or number; null: no switch."""
    workers: Annotated[int, Field(ge=1, le=MAX_WORKERS)] | None = None
    """The number of worker processes; null: one per GPU, or one. The variable MOREH_WORKERS overrides this key."""
    advanced_parallelization: ParallelizationSection | None = ParallelizationSection()
    """The options of the one line; null: train without the line, on one device in full precision."""

    def options(self) -> dict[str, Any]:
        """The arguments of `enable_advanced_parallelization`: the options that are not left at their defaults."""
        section = self.advanced_parallelization
        return {} if section is None else section.model_dump(exclude_defaults=True)

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        if self.workers not in (None, 1) and self.advanced_parallelization is None:
            raise ValueError(
                f"workers is {self.workers}, but advanced_parallelization is null, and without it there is one worker: "
                "leave workers out, or give advanced_parallelization its keys (or {})"
            )
        return self


class TokenizerSection(Section):
    """The tokenizer of a new model."""

    pretrained: PathText | None = None
    """A tokenizer on the Hub or in a local directory; null: train a byte-level BPE tokenizer on the data."""
    vocabulary_size: Annotated[int, Field(ge=300, le=1_000_000)] | None = None
    """The vocabulary size of a newly trained tokenizer, including the 256 bytes and the end-of-text token; null:
    4096."""

    def entries_to_train(self) -> int:
        """`vocabulary_size`, or its default."""
        return 4096 if self.vocabulary_size is None else self.vocabulary_size

    @model_validator(mode="after")
    def _check_vocabulary_size(self) -> Self:
        if self.pretrained is not None and self.vocabulary_size is not None:
            raise ValueError(
                f"pretrained is {self.pretrained!r}, whose vocabulary has the size it has, and vocabulary_size is "
                f"{self.vocabulary_size}: leave one of them out"
            )
        return self


class TrainSection(Section):
    """The training loop."""

    steps: Positive | None = None
    """The number of optimizer steps; give exactly one of steps and epochs."""
    epochs: Positive | None = None
    """The number of passes over the training rows; give exactly one of steps and epochs."""
    batch_size: Positive = 16
    """Rows per forward pass."""
    gradient_accumulation: Positive = 1
    """Forward passes per optimizer step. Every label token has the same weight, however the rows are batched."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """The peak learning rate, reached at the end of the warm-up."""
    optimizer: Literal["adamw", "adam", "nadam", "radam", "adafactor", "muon", "sgd", "rmsprop"] = "adamw"
    """The optimizer from `torch.optim`."""
    optimizer_state_dtype: Literal["weights", "float32"] = "weights"
    """The dtype of the optimizer state: that of the weights, or float32. With `model.dtype: bfloat16`, only adamw
    supports float32; it then computes each update in float32."""
    optimizer_settings: dict[str, Any] = Field({})
    """Settings of the optimizer besides learning rate and weight decay, such as `{betas: [0.9, 0.95]}`."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """The learning-rate schedule after the warm-up.
    `wsd` (warm-up, stable, decay) stays at `lr` until the last `decay_steps` steps, which decay it."""
    decay_steps: Positive | None = None
    """The number of decay steps of `wsd`; null: a fifth of the steps."""
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """The shape of the decay of `wsd`."""
    warmup_steps: NotNegative = 0
    """The number of steps in which the learning rate rises linearly; it is above 0 in the first step."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The learning rate of the last step, as a fraction of `lr`; a constant schedule ignores it."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """The optimizer's weight decay.
    In adamw, muon and adafactor it shrinks the weights (decoupled); in the others it is added to the gradient (L2)."""
    decay_norms_and_biases: bool = True
    """Apply weight decay to norms and biases as well as to matrices and embeddings."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """The global norm to which gradients are clipped."""
    non_finite: Literal["stop", "skip", "go_back"] = "stop"
    """How to treat a step whose loss or gradient norm is not finite: end the run, or skip the weight update.
    `go_back` also restores the weights and the optimizer state of the last checkpoint, and continues with the next
    rows. Three such steps in a row end the run."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The random seed for held-out rows, data order, initial weights and dropout."""
    loader_workers: NotNegative = 0
    """The number of background processes that prepare batches."""

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if self.steps is not None and self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, but there are only {self.steps} steps: give fewer warmup_steps"
            )
        if self.schedule != "wsd" and (self.decay_steps is not None or self.decay_shape != "linear"):
            raise ValueError(
                f"decay_steps and decay_shape are of the schedule wsd, and schedule is {self.schedule}: leave them "
                "out, or give schedule: wsd"
            )
        if self.steps is not None and self.warmup_steps + (self.decay_steps or 0) > self.steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} and decay_steps is {self.decay_steps}, but there are only "
                f"{self.steps} steps: give fewer of the two"
            )
        return self

    @field_validator("optimizer_settings")
    @classmethod
    def _known_settings(cls, settings: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "optimizer" in info.data:
            check_optimizer_settings(info.data["optimizer"], settings)
        return settings


class LogSection(Section):
    """Logs, evaluation and reports of a run."""

    every_steps: Positive = 10
    """Steps between two console lines; `metrics.jsonl` has every step."""
    eval_every_steps: Positive | None = None
    """Steps between two evaluations on the held-out rows; null: only before and after training. Every run evaluates
    before and after training."""
    eval_batch_size: Positive | None = None
    """Rows per forward pass in evaluation; null: as in training. The loss does not depend on this key."""
    sample_tokens: NotNegative = 64
    """The number of tokens that each evaluation generates from a held-out prompt, as a sample; 0: no sample."""
    rouge_rows: NotNegative = 0
    """The number of held-out rows for ROUGE-1, ROUGE-2 and ROUGE-L, which compare generated responses with those in
    the data before and after training; 0: none. Needs the package `rouge-score`."""
    example_functions: NotNegative = 0
    """The number of held-out Python functions whose docstring examples are run with the model's body, before and after
    training; 0: none. Each runs in a process with limits on time, memory and files, which is no sandbox."""
    platform_lines: bool = False
    """Log the search for a plan in the MoAI Platform's lines instead of one line. The variable MOREH_PLATFORM_LINES
    overrides this key."""
    report: bool = True
    """Write `report.html` to the run's directory, and update it during the run."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default=[])
    """Trackers that also receive the metrics: TensorBoard event files, Weights & Biases, MLflow.
    Each tracker needs its package, and reads its own variables, such as `WANDB_PROJECT` or `MLFLOW_TRACKING_URI`."""


class Config(Section):
    """All settings of a run."""

    run: RunSection
    accelerator: AcceleratorSection = AcceleratorSection()
    model: ModelSection
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataSection
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    stop: StopSection = StopSection()
    launch: LaunchSection = LaunchSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _check_tokenizer(self) -> Self:
        if self.model.pretrained is not None and self.tokenizer != TokenizerSection():
            raise ValueError(
                "model.pretrained brings its own tokenizer: leave the section tokenizer out (or say tokenizer={})"
            )
        return self

    @model_validator(mode="after")
    def _check_optimizer_state_dtype(self) -> Self:
        train = self.train
        if self.model.dtype == "bfloat16" and train.optimizer_state_dtype == "float32" and train.optimizer != "adamw":
            raise ValueError(
                f"train.optimizer_state_dtype is 'float32' with weights in bfloat16, which {train.optimizer} does not "
                "have here: give train.optimizer: adamw, or train.optimizer_state_dtype: weights"
            )
        return self
