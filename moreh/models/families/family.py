"""The record of a model family in the registry."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from moreh.models.architecture import Architecture
from moreh.models.families.hf_config import ConfigKeys, HFConfig
from moreh.models.families.tp_blocks import Experts, TPBlock

# The value of Family.tensor_parallel for families that follow `config.base_model_tp_plan` of transformers.
FROM_TRANSFORMERS: Final = "from transformers"


@dataclass(frozen=True)
class Family:
    """A family of decoder-only language models: all models of one `model_type`.

    Tests compare what a field says with the model's own forward pass on one process, for every family of the registry.
    The fields name these tests.
    """

    model_type: str
    """The name of the family in transformers, `config.model_type`, such as "llama"."""
    tensor_parallel: tuple[TPBlock, ...] | Literal["from transformers"] | None = None
    """The tensor-parallel split of a layer. FROM_TRANSFORMERS if transformers' plan splits matrices by columns and
    then by rows. Blocks of its own if transformers has no plan, or one that gathers results between the two. None if
    tensor parallelism is not known to compute the same; it is then refused. Test:
    tests/runtime/tensor/test_tensor_parallel.py."""
    experts: Experts | None = None
    """The experts of layers that have some, with `tensor_parallel`: the ranks divide them among themselves. Test: as
    above."""
    whole: tuple[str, ...] = ()
    """Modules of a layer, with `tensor_parallel`, that every rank has and computes whole. They rule out sequence
    parallelism. Test: as above."""
    packable: bool = False
    """True if several sequences may share a row: transformers keeps their attention apart by their positions, which
    begin at 0 in each sequence. Test: tests/runtime/batch/test_packing.py."""
    config_keys: ConfigKeys | None = None
    """The keys of the family's config.json; None if transformers has to read the file and build the model."""
    architecture: Callable[[HFConfig], Architecture] | None = None
    """The architecture from a configuration, in milliseconds and without torch. None if transformers has to build the
    model on the meta device, which takes seconds. Test: tests/models/test_architecture.py."""

    def __post_init__(self) -> None:
        if self.tensor_parallel is None and (self.experts is not None or self.whole):
            raise ValueError(f"family {self.model_type!r}: experts and whole belong to tensor_parallel, which is None")
        if (self.config_keys is None) != (self.architecture is None):
            raise ValueError(
                f"family {self.model_type!r}: give both config_keys and architecture, or neither: architecture "
                "computes with the values that config_keys reads"
            )
