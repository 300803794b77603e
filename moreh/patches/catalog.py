"""The list of all declared patches, also as Markdown for docs/patches.md (`python -m moreh.patches`)."""

import importlib
import pkgutil
import textwrap
from collections.abc import Iterator
from typing import Any

import moreh.patches
from moreh.patches.patch import Patch
from moreh.patches.process_changes import PROCESS_CHANGES, ProcessChange

_WIDTH = 120
_MAX_LISTED_NAMES = 8


def declared() -> tuple[Patch, ...]:
    """Every patch that a module of this package declares, active or not, by file. Imports all of them."""
    import torch  # noqa: F401  first: at its end torch imports moreh.attach, which imports modules of this package

    patches: dict[int, Patch] = {}
    for module_info in pkgutil.walk_packages(moreh.patches.__path__, f"{moreh.patches.__name__}."):
        if module_info.name.endswith(".__main__"):
            continue
        for value in vars(importlib.import_module(module_info.name)).values():
            patches |= {id(patch): patch for patch in _patches_in(value) if patch.module == module_info.name}
    return tuple(patches.values())


def _patches_in(value: Any) -> Iterator[Patch]:
    """The patches that a module's variable holds: itself, or the items of a collection."""
    if isinstance(value, Patch):
        yield value
    elif isinstance(value, tuple | list):
        yield from (item for item in value if isinstance(item, Patch))
    elif isinstance(value, dict):
        yield from (item for item in value.values() if isinstance(item, Patch))


def markdown() -> str:
    """The declared patches with their files and reasons, and the list of process changes."""
    return "\n".join(
        [
            *(line for patch in declared() for line in _reasons(patch)),
            "",
            "Changes of the process that do not replace an attribute of a library:",
            "",
            *(line for change in PROCESS_CHANGES for line in _change(change)),
        ]
    )


def _reasons(patch: Patch) -> list[str]:
    """A list item with the purpose of a patch, and the reason why no public API serves."""
    lines = _item(f"`{patch.target}` in `{patch.file}`, tested with {', '.join(patch.tested)}:")
    lines += _continued(patch.why)
    if patch.names:
        listed = ", ".join(f"`{name}`" for name in patch.names[:_MAX_LISTED_NAMES])
        more = len(patch.names) - _MAX_LISTED_NAMES
        lines += _continued(f"Names: {listed}" + (f" and {more} more." if more > 0 else "."))
    return lines + _continued(f"Why not a public API: {patch.no_public_way}")


def _change(change: ProcessChange) -> list[str]:
    """A list item with the changed object, the file and the purpose."""
    return _item(f"`{change.what}` in `{change.where}`:") + _continued(change.why)


def _item(text: str) -> list[str]:
    return _wrapped(text, "- ")


def _continued(text: str) -> list[str]:
    return _wrapped(text, "  ")


def _wrapped(text: str, start: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=start, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
