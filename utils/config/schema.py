"""The settings of a run: every key, its type, its default and what it allows.

`yaml_file` reads them, and `markdown` writes docs/configuration.md from these declarations and their docstrings.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationInfo, field_validator, model_validator
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


class RunSection(Section):
    """Where the run writes its files."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Everything is written to `<directory>/<name>/`; an earlier run of that name is kept as `<name>.1`."""
    directory: PathText = "runs"
    """The directory of all runs."""
    cache_directory: PathText = ".cache"
    """Tokenizers and tokenized data are kept here and reused by later runs."""
    tensorboard: bool = False
    """The same as `tensorboard` among `log.trackers`."""


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


class TokenizerSection(Section):
    """The tokenizer of a new model."""

    pretrained: PathText | None = None
    """A tokenizer of the hub or a local directory; null trains a byte-level BPE tokenizer on the data."""
    vocabulary_size: Annotated[int, Field(ge=300, le=1_000_000)] | None = None
    """Entries of a tokenizer that is trained, including the 256 bytes and the end-of-text token; null: 4096."""

    def entries_to_train(self) -> int:
        """`vocabulary_size`, or its default."""
        return 4096 if self.vocabulary_size is None else self.vocabulary_size

    @model_validator(mode="after")
    def _size_is_of_a_trained_one(self) -> Self:
        if self.pretrained is not None and self.vocabulary_size is not None:
            raise ValueError(
                f"pretrained is {self.pretrained!r}, whose vocabulary has the size it has, and vocabulary_size is "
                f"{self.vocabulary_size}: leave one of them out"
            )
        return self


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
    optimizer: Literal["adamw", "adam", "nadam", "radam", "adafactor", "muon", "sgd", "rmsprop"] = "adamw"
    """The optimizer of torch that updates the weights."""
    optimizer_state_dtype: Literal["weights", "float32"] = "weights"
    """The type of the optimizer's state: that of the weights, or float32. With `model.dtype: bfloat16`, float32 is for
    adamw, and computes its update in float32."""
    optimizer_settings: dict[str, Any] = Field({})
    """Settings of the optimizer other than its learning rate and weight decay, such as `{betas: [0.9, 0.95]}`."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """How the learning rate falls after the warm-up.
    `wsd` (warm-up, stable, decay) keeps it at `lr` and lets it fall in the last `decay_steps` steps."""
    decay_steps: Positive | None = None
    """Steps over which the learning rate falls with `wsd`; null: a fifth of the steps."""
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """How the learning rate falls in the last steps of `wsd`."""
    warmup_steps: NotNegative = 0
    """Steps over which the learning rate rises; the first one already learns."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The learning rate of the last step, as a fraction of `lr`; a constant schedule ignores it."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """The optimizer's weight decay.
    In adamw, muon and adafactor it shrinks the weights (decoupled); in the others it is added to the gradient (L2)."""
    decay_norms_and_biases: bool = True
    """Whether the weight decay counts for norms and biases as well as for matrices and embeddings."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this global norm."""
    non_finite: Literal["stop", "skip", "go_back"] = "stop"
    """What happens at a step whose loss or gradient norm is not finite: the run ends, or the step changes no weights.
    `go_back` also takes the weights and the optimizer's state of the last checkpoint, and goes on with the next rows.
    Three such steps in a row end the run."""
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
        if self.schedule != "wsd" and (self.decay_steps is not None or self.decay_shape != "linear"):
            raise ValueError(
                f"decay_steps and decay_shape are of the schedule wsd, and schedule is {self.schedule}: leave them "
                "out, or give schedule: wsd"
            )
        if self.steps is not None and self.warmup_steps + (self.decay_steps or 0) > self.steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} and decay_steps is {self.decay_steps}, but there are only "
                f"{self.steps} steps"
            )
        return self

    @field_validator("optimizer_settings")
    @classmethod
    def _known_settings(cls, settings: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "optimizer" in info.data:
            check_optimizer_settings(info.data["optimizer"], settings)
        return settings


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
    rouge_rows: NotNegative = 0
    """Held-out rows whose responses are generated before and after the training, for ROUGE-1, ROUGE-2 and ROUGE-L:
    what they have in common with those in the data. 0: none. Needs the package `rouge-score`."""
    platform_lines: bool = False
    """Log the MoAI Platform's lines about the search for a plan, instead of one line of the plan. The variable
    MOREH_PLATFORM_LINES overrides it."""
    report: bool = True
    """Write `report.html` in the directory of the run, and renew it while the run goes on."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default=[])
    """Also send the metrics to these: event files of TensorBoard, Weights & Biases, MLflow.
    Each needs its package; their own variables, such as `WANDB_PROJECT` or `MLFLOW_TRACKING_URI`, say where to."""


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
    def _tokenizer_comes_with_model(self) -> Self:
        if self.model.pretrained is not None and self.tokenizer != TokenizerSection():
            raise ValueError(
                "model.pretrained brings its own tokenizer: leave the section tokenizer out (or say tokenizer={})"
            )
        return self

    @model_validator(mode="after")
    def _state_can_have_its_type(self) -> Self:
        train = self.train
        if self.model.dtype == "bfloat16" and train.optimizer_state_dtype == "float32" and train.optimizer != "adamw":
            raise ValueError(
                f"train.optimizer_state_dtype is 'float32' with weights in bfloat16, which {train.optimizer} does not "
                "have here: give train.optimizer: adamw, or train.optimizer_state_dtype: weights"
            )
        return self
