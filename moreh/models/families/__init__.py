"""The registry of model families; every other list of families is derived from it.

- `registry.py`: all families, and how to add one.
- `family.py`: the record of a family, field by field.
- `tp_blocks.py`: how tensor-parallel ranks split a layer, in terms that a record can use.
- `hf_config.py`, `layers.py`: how a record makes an architecture from a config.json.
- Every other file is a family, named like its model type.

Nothing here imports torch or transformers: moreh-plan answers without them. `python -m moreh.models.families` prints
the families as a Markdown table.
"""

from moreh.models.families.family import FROM_TRANSFORMERS, Family
from moreh.models.families.registry import (
    FAMILIES,
    packable_families,
    planned_families,
    register,
    tensor_parallel_families,
)

__all__ = [
    "FAMILIES",
    "FROM_TRANSFORMERS",
    "Family",
    "packable_families",
    "planned_families",
    "register",
    "tensor_parallel_families",
]
