"""Prints the families as the Markdown table of the documentation: python -m moreh.models.families."""

from moreh.models.families.family import FROM_TRANSFORMERS, Family
from moreh.models.families.registry import FAMILIES

_HEADER = ("family", "tensor parallel", "packed", "planned without transformers")


def table() -> str:
    """A Markdown table with a row for each family."""
    rows = [_HEADER, tuple("---" for _ in _HEADER), *(_row(FAMILIES[name]) for name in sorted(FAMILIES))]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(family: Family) -> tuple[str, ...]:
    if family.tensor_parallel is None:
        tensor_parallel = "no"
    else:
        tensor_parallel = "plan of transformers" if family.tensor_parallel == FROM_TRANSFORMERS else "own rule"
    packed, planned = ("yes" if known else "no" for known in (family.packable, family.architecture is not None))
    return f"`{family.model_type}`", tensor_parallel, packed, planned


if __name__ == "__main__":
    print(table())
