"""The settings section `model`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from utils.config.architecture_keys import check_architecture_keys
from utils.config.section import NonEmpty, PathText, Positive, Section

# The file of PEFT that makes a directory one of an adapter.
ADAPTER_FILE = "adapter_config.json"


class LoraSection(Section):
    """LoRA adapters (https://arxiv.org/abs/2106.09685) of the layers' matrices; only the adapters are trained and
    saved."""

    r: Positive = 16
    """The rank of the adapters."""
    alpha: Positive | None = None
    """The output of an adapter is scaled by `alpha / r`; null: 2 r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The dropout probability on an adapter's input."""
    targets: Literal["all-linear"] | Annotated[list[NonEmpty], Field(min_length=1)] = "all-linear"
    """The names of the matrices with adapters, such as `[q_proj, v_proj]`.
    `all-linear` stands for all matrices of the layers."""

    def scale_numerator(self) -> int:
        """`alpha`, or its default."""
        return 2 * self.r if self.alpha is None else self.alpha


class ModelSection(Section):
    """The model: exactly one of `pretrained` and `architecture`."""

    pretrained: PathText | None = None
    """A model on the Hugging Face Hub or in a local directory; the run uses its tokenizer."""
    architecture: dict[str, Any] | None = None
    """A new model with random weights: `model_type` and the keys of transformers' configuration for that type."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the weights. With float32 weights, `mixed_precision` may still compute matmuls in bfloat16.
    With bfloat16 weights, weights and gradients take half the memory, and updates below 1/256 of a weight may be
    rounded away."""
    lora: LoraSection | None = None
    """Train LoRA adapters of a pretrained model; null trains all parameters.
    Needs the package `peft`."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.pretrained is None) == (self.architecture is None):
            raise ValueError("give exactly one of pretrained and architecture")
        if self.lora is not None and self.pretrained is None:
            raise ValueError(
                "lora trains adapters of a pretrained model, and architecture is a new one with random weights: give "
                "pretrained, or leave lora out"
            )
        return self

    @field_validator("pretrained")
    @classmethod
    def _directory_exists(cls, pretrained: str | None) -> str | None:
        """Refuse a path that is not there. The hub would answer with an error about repository names."""
        if pretrained is not None and pretrained.startswith((".", "/")) and not Path(pretrained).is_dir():
            raise ValueError(
                f"there is no directory {pretrained}: give one that holds a model, or the name of one on the hub"
            )
        if pretrained is not None and (Path(pretrained) / ADAPTER_FILE).is_file():
            raise ValueError(
                f"{pretrained} holds an adapter: merge it into its base model with `python scripts/export.py "
                f"{pretrained} DIRECTORY --merge`, and give DIRECTORY"
            )
        return pretrained

    @field_validator("architecture")
    @classmethod
    def _known_keys(cls, architecture: dict[str, Any] | None) -> dict[str, Any] | None:
        if architecture is not None:
            check_architecture_keys(architecture)
        return architecture
