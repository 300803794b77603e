"""The declaration of a process-wide patch, its installation, and the list of the active ones.

A patch replaces attributes of torch, transformers or another library for the whole process. Each is declared as a
`Patch` in a module of this package, next to the code that computes the replacement, and installed through it, so that
`active()` and the documentation know all of them. `tests/patches/test_canaries.py` compares the signature and the
source of every target with those that the patch was written for.

Nothing here imports torch, so that the command-line tools may import this module.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


def _declaring_module() -> str:
    """The name of the module that is making a `Patch`: two frames up, past the generated `__init__`."""
    name: str = sys._getframe(2).f_globals["__name__"]
    return name


@dataclass(frozen=True)
class Patch:
    """A replaced attribute of a library, or a group of them that are replaced for one reason."""

    target: str
    """The dotted name of the replaced object, such as "torch.nn.Module._call_impl"; of a group, that of the owner."""
    why: str
    """The effect of the replacement, and what would not work without it."""
    no_public_way: str
    """The reason why no public interface of the library serves."""
    tested: tuple[str, ...]
    """The releases that the patch was tested with, such as "torch 2.13"."""
    names: tuple[str, ...] = ()
    """The replaced attributes of a group, as dotted names below `target`. Empty for a single target."""
    adds: bool = False
    """True if the target is an attribute that the library does not have."""
    module: str = field(default_factory=_declaring_module, repr=False)
    """The module that declares the patch, set automatically."""

    @property
    def targets(self) -> tuple[str, ...]:
        """The dotted name of every attribute that is replaced."""
        return tuple(f"{self.target}.{name}" for name in self.names) or (self.target,)

    @property
    def file(self) -> str:
        """The file that declares the patch, such as "moreh/patches/module_call.py"."""
        return f"{self.module.replace('.', '/')}.py"

    @property
    def is_active(self) -> bool:
        """True if the targets are replaced now."""
        return any(target in _active for target in self.targets)

    def install(self, make_replacement: Callable[[Any], Any]) -> Any:
        """Replace the target with `make_replacement(original)`, once per process; returns the original.

        Raises:
            AssertionError: the patch is active already, or is a group.
        """
        assert not self.names, f"{self.target} is a group: use install_each"
        self.install_each(lambda _, original: make_replacement(original))
        return _active[self.target].original

    def install_each(self, make_replacement: Callable[[str, Any], Any]) -> None:
        """Replace each target with `make_replacement(name, original)`, where `name` is its name below `target`.

        Raises:
            AssertionError: the patch is active already.
        """
        assert not self.is_active, f"{self.target} is patched already"
        for name, target in zip(self.names or ("",), self.targets, strict=True):
            owner, attribute = _owner_of(target)
            is_own = attribute in vars(owner)
            # As it is stored, if the owner is a class: a classmethod or staticmethod is not unwrapped.
            original = vars(owner)[attribute] if is_own else getattr(owner, attribute, None)
            assert self.adds or is_own or hasattr(owner, attribute), f"{target} does not exist"
            setattr(owner, attribute, make_replacement(name, original))
            _active[target] = _Installed(self, original, is_own)

    def uninstall(self) -> None:
        """Put the originals back."""
        for target in self.targets:
            installed = _active.pop(target)
            owner, attribute = _owner_of(target)
            if installed.is_own:
                setattr(owner, attribute, installed.original)
            else:
                delattr(owner, attribute)  # the original is inherited, or there was none


@dataclass(frozen=True)
class _Installed:
    """A target that is replaced now."""

    patch: Patch
    original: Any
    """The replaced object; None if there was none."""
    is_own: bool
    """True if the owner had the original itself, rather than by inheritance."""


@dataclass(frozen=True)
class ActivePatch:
    """One replaced attribute, as the tools and reports of bugs show it."""

    target: str
    """The dotted name of the replaced object."""
    why: str
    """The effect of the replacement, and what would not work without it."""
    tested: tuple[str, ...]
    """The releases that the patch was tested with."""
    file: str
    """The file that declares the patch, such as "moreh/patches/module_call.py"."""


# The replaced attributes by dotted name, in the order of their installation.
_active: dict[str, _Installed] = {}


def active() -> tuple[ActivePatch, ...]:
    """Every attribute that is replaced in this process now, in the order of installation."""
    return tuple(
        ActivePatch(target, installed.patch.why, installed.patch.tested, installed.patch.file)
        for target, installed in _active.items()
    )


def original_of(target: str) -> Any:
    """The library's own object under a dotted name, even if it is replaced now; None for an added attribute."""
    if target in _active:
        return _active[target].original
    owner, attribute = _owner_of(target)
    return vars(owner)[attribute] if attribute in vars(owner) else getattr(owner, attribute)


def resolve(path: str) -> Any:
    """The module, class or function with a dotted name; imports the modules in it.

    Raises:
        ImportError: there is no such module.
        AttributeError: a module or class does not have what the name says.
    """
    first, *others = path.split(".")
    value: Any = importlib.import_module(first)
    imported = first
    for part in others:
        imported = f"{imported}.{part}"
        if not hasattr(value, part) and hasattr(value, "__path__"):
            importlib.import_module(imported)
        value = getattr(value, part)
    return value


def _owner_of(target: str) -> tuple[Any, str]:
    """The module or class that has a target, and the target's name there."""
    path, _, attribute = target.rpartition(".")
    return resolve(path), attribute
