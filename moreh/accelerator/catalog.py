"""Reads the catalogs of devices and flavors (`data/*.json`) and validates their entries.

The entries are written by hand. An error names the file, the entry, the key, the value and what is allowed.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from moreh.errors import AcceleratorError

# The lowest value of a rate that a device can have: one that is lower was written without its exponent.
MIN_FLOPS_PER_SECOND = 1e12
MIN_BYTES_PER_SECOND = 1e8


def read_catalog(path: Path) -> Any:
    """The content of a catalog.

    Raises:
        AcceleratorError: the file is not JSON, or has a key twice.
    """

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise AcceleratorError(f"{path.name}: {twice!r} is there twice; remove or rename one")
        return content

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_duplicates)
    except json.JSONDecodeError as error:
        raise AcceleratorError(f"{path.name}, line {error.lineno}: {error.msg}; correct the JSON there") from None


def check_entry(path: Path, name: str, entry: Any, declared: Iterable["Field[Any]"]) -> None:
    """Check the keys of an entry and the types and magnitudes of its values against the fields of a dataclass.

    Raises:
        AcceleratorError: a key is missing or unknown, or a value is not allowed.
    """
    where = f"{path.name}, entry {name!r}"
    if not isinstance(entry, Mapping):
        raise AcceleratorError(f"{where}: {entry!r} is not an object; give the keys that the other entries have")
    by_name = {field.name: field for field in declared}
    missing = [key for key, field in by_name.items() if key not in entry and field.default is MISSING]
    unknown = [key for key in entry if key not in by_name]
    if missing or unknown:
        parts = [f"missing are {', '.join(missing)}"] if missing else []
        parts += [f"unknown are {', '.join(unknown)}"] if unknown else []
        raise AcceleratorError(f"{where}: {'; '.join(parts)}; the keys are {', '.join(by_name)}")
    for key, value in entry.items():
        if (allowed := _allowed(by_name[key], value)) is not None:
            raise AcceleratorError(f"{where}: {key} is {value!r}; expected {allowed}")


def _allowed(field: "Field[Any]", value: Any) -> str | None:
    """The allowed values of a field, if the given one is not allowed."""
    kind = str(getattr(field.type, "__name__", field.type))
    if value is None and "None" in kind:
        return None
    or_null = " or null" if "None" in kind else ""
    if kind.startswith("tuple"):
        are_strings = isinstance(value, list) and all(isinstance(item, str) and item for item in value)
        return None if are_strings else "a list of strings"
    if kind.startswith("bool"):
        return None if isinstance(value, bool) else "true or false"
    if kind.startswith("str"):
        return None if isinstance(value, str) and value else "a string"
    if kind.startswith("int"):
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        return None if is_count else f"a whole number from 1{or_null}"
    unit, minimum = ("FLOP/s", MIN_FLOPS_PER_SECOND) if "flops" in field.name else ("bytes/s", MIN_BYTES_PER_SECOND)
    is_rate = isinstance(value, int | float) and not isinstance(value, bool) and minimum <= value < float("inf")
    return None if is_rate else f"a number from {minimum:g} ({unit}){or_null}"


def declared_fields(declaration: type, *without: str) -> list["Field[Any]"]:
    """The fields of a dataclass that an entry gives, all but those named."""
    return [field for field in fields(declaration) if field.name not in without]
