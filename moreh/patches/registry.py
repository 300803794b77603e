"""Process-wide patches: what each replaces and why, and which are active.

A patch replaces an attribute of torch, transformers or another library for the whole process. Each is declared as a `Patch`
in a module of this package, next to the code that computes the replacement, and installed through it, so that `active()` and
the documentation know of all of them. `tests/patches/test_canaries.py` compares the signature and the source of every
target with those that the patch was written for.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Patch:
    """A replaced attribute of a library."""

    target: str
    """The dotted name of what is replaced, such as "torch.nn.Module._call_impl"."""
    why: str
    """What the replacement does, and what would not work without it."""
    no_public_way: str
    """Why no public interface of the library serves."""
    tested: tuple[str, ...]
    """The releases that the patch was tested with, such as "torch 2.13"."""

    def install(self, make_replacement: Callable[[Any], Any]) -> Any:
        """Replace the target by what `make_replacement` makes of the original, which is returned. Once in a process.

        Raises:
            AssertionError: the patch is active already.
        """
        assert self.target not in _active, f"{self.target} is patched already"
        owner, name = self._owner()
        # As it is stored: a classmethod or staticmethod of a class is not unwrapped.
        original = owner.__dict__[name] if isinstance(owner, type) and name in owner.__dict__ else getattr(owner, name)
        setattr(owner, name, make_replacement(original))
        _active[self.target] = (self, original)
        return original

    def uninstall(self) -> None:
        """Put the original back."""
        _, original = _active.pop(self.target)
        owner, name = self._owner()
        setattr(owner, name, original)

    @property
    def is_active(self) -> bool:
        """Whether the target is replaced now."""
        return self.target in _active

    def _owner(self) -> tuple[Any, str]:
        """The module or class that has the target, and its name there."""
        path, _, name = self.target.rpartition(".")
        return resolve(path), name


# The active patches and the originals that they replaced, by target, in the order of installation.
_active: dict[str, tuple[Patch, Any]] = {}


def resolve(path: str) -> Any:
    """The module, class or function with a dotted name; imports what the name needs."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(path)


def active() -> tuple[Patch, ...]:
    """The patches that are in force in this process, in the order of their installation."""
    return tuple(patch for patch, _ in _active.values())
