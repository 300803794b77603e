"""What is known of one family of transformers: the record that the registry has for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from moreh.models.architecture import Architecture
from moreh.models.families.hf_config import ConfigKeys, HFConfig
from moreh.models.families.tp_blocks import TPBlock

# The value of Family.tensor_parallel for families that follow `config.base_model_tp_plan` of transformers.
FROM_TRANSFORMERS: Final = "from transformers"


@dataclass(frozen=True)
class Family:
    """A family of decoder-only language models: all models of one `model_type`.

    What a field says was shown by a comparison with the model's own forward pass on one process; the tests named here
    run it for every family of the registry.
    """

    model_type: str
    """The name of the family in transformers, `config.model_type`, such as "llama"."""
    tensor_parallel: tuple[TPBlock, ...] | Literal["from transformers"] | None = None
    """How tensor-parallel ranks split a layer: FROM_TRANSFORMERS where transformers has a plan that splits matrices by
    columns and then by rows; blocks of its own where it has none, or one that gathers what it has split in between.
    None where tensor parallelism is not known to compute the same: it is refused. Compared in
    tests/runtime/tensor/test_tensor_parallel.py."""
    packable: bool = False
    """Whether several sequences may share a row: transformers keeps their attention apart by their positions, which
    begin at 0 with each. Compared in tests/runtime/batch/test_packing.py."""
    config_keys: ConfigKeys | None = None
    """The keys of its config.json; None where planning leaves it to transformers to read one and build the model."""
    architecture: Callable[[HFConfig], Architecture] | None = None
    """The architecture from a configuration, without torch and in milliseconds; None where transformers builds the
    model on the meta device to look at it, which takes seconds. Compared in tests/models/test_architecture.py."""

    def __post_init__(self) -> None:
        if (self.config_keys is None) != (self.architecture is None):
            raise ValueError(
                f"family {self.model_type!r}: give both config_keys and architecture, or neither: architecture "
                "computes with the values that config_keys reads"
            )
