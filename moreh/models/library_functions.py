"""The library functions that a model's forward pass looks up by name, in modules and classes.

A script may exchange one at any time, such as `loss_utils.fixed_cross_entropy`, `functional.cross_entropy`,
`masking_utils.create_causal_mask` or the `forward` of a class. `LibraryFunctions` tells whether all are the libraries'
own, and then, in microseconds, whether they still are.
"""

import builtins
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from moreh.models.provenance import LIBRARIES, is_library_function, wrapped_chain

# Where a module's call begins.
_CALL_NAMES = frozenset({"forward", "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "loss_function"})
# Base classes whose other methods save, load and change models; no forward pass calls them.
_BASE_CLASSES = re.compile(
    r"torch\.nn\.modules\.module|transformers\.(modeling_utils|generation|integrations|utils)|peft\.(peft_model|mixed_model)"
)
# Found through a registry, not by name.
_REACHED_INDIRECTLY = {
    "transformers.loss.loss_utils": ("ForCausalLMLoss",),
    "transformers.integrations.sdpa_attention": ("sdpa_attention_forward",),
    "transformers.masking_utils": ("sdpa_mask", "eager_mask"),
}
# What transformers' loss is computed with. The runtime computes it itself, in the place of these functions.
_LOSS = re.compile(r"transformers\.loss\.loss_utils\..*|torch\.nn\.functional\.cross_entropy")

# Classes and modules by dotted name, and names that functions in them use.
_Reachable = tuple[dict[str, Mapping[str, Any]], list[str]]
# What the modules of some classes reach: found out once for the models of one kind.
_known_reachable: dict[frozenset[type], _Reachable] = {}
_MAX_KNOWN = 16


class LibraryFunctions:
    """The functions that the modules of one model use, as they were when this object was made."""

    def __init__(self, root: nn.Module) -> None:
        classes = frozenset(cls for module in root.modules() for cls in type(module).__mro__ if cls is not object)
        namespaces, names = _known_reachable.get(classes) or _reachable(classes)
        # The names of each namespace, and the objects that they refer to.
        self._recorded: list[tuple[Mapping[str, Any], Callable[[Any], Any], Any]] = []
        # How many names each class has: one that is added may hide another of a base class.
        self._sizes = [(vars(cls), len(vars(cls))) for cls in (*classes, torch.Tensor)]
        self.all_replaced: list[str] = []
        """The dotted names of the functions that are not the library's own."""
        for label, namespace in namespaces.items():
            used = tuple(name for name in names if name in namespace and _is_function(namespace[name]))
            if used:
                get = itemgetter(*used)
                self._recorded.append((namespace, get, get(namespace)))
            self.all_replaced += [f"{label}.{name}" for name in used if not _is_own(label, name, namespace[name])]
        # A function of the script would hide the functions that the library's own calls.
        if self.replaced is None:
            _known_reachable[classes] = namespaces, names
            if len(_known_reachable) > _MAX_KNOWN:
                del _known_reachable[next(iter(_known_reachable))]

    @property
    def replaced(self) -> str | None:
        """The first function that is not the library's own; None if all are."""
        return next(iter(self.all_replaced), None)

    @property
    def replaced_loss(self) -> str | None:
        """The first one that transformers' loss is computed with; None if that is the library's own."""
        return next(filter(_LOSS.fullmatch, self.all_replaced), None)

    def are_unchanged(self) -> bool:
        """True if all names still refer to the recorded objects."""
        try:
            if any(get(namespace) != values for namespace, get, values in self._recorded):
                return False
        except KeyError:
            return False
        return all(len(namespace) == size for namespace, size in self._sizes)


def _reachable(classes: frozenset[type]) -> _Reachable:
    """The classes and modules by dotted name, and the names that functions in them use; more rather than too few."""
    namespaces: dict[str, Mapping[str, Any]] = {
        f"{cls.__module__}.{cls.__qualname__}": vars(cls)
        for cls in sorted(classes, key=lambda cls: (cls.__module__, cls.__qualname__))
    }
    for name in _REACHED_INDIRECTLY:
        namespaces[name] = vars(__import__(name, fromlist=["_"]))
    namespaces["torch.Tensor"] = vars(torch.Tensor)
    names: dict[str, None] = dict.fromkeys([*sorted(_CALL_NAMES), *chain(*_REACHED_INDIRECTLY.values())])
    seen: set[int] = set()
    number_before = (0, 0)
    while number_before != (number_before := (len(names), len(namespaces))):
        for label, namespace in list(namespaces.items()):
            found = names if not _BASE_CLASSES.match(label) or label in sys.modules else _CALL_NAMES
            for name in list(found):
                value = namespace.get(name)
                if isinstance(value, ModuleType) and f"{value.__name__}.".startswith((*LIBRARIES, "torch.")):
                    namespaces.setdefault(value.__name__, vars(value))
                for function in _functions_of(value):
                    if id(function) not in seen:
                        seen.add(id(function))
                        _follow(function, names, namespaces)
    return namespaces, list(names)


def _follow(function: Any, names: dict[str, None], namespaces: dict[str, Mapping[str, Any]]) -> None:
    """Add the names that a function of transformers, PEFT or torch's modules uses, and the module that it is in."""
    module = function.__globals__.get("__name__", "")
    if not module.startswith((*LIBRARIES,)):
        return
    if module != "torch.nn.functional":
        namespaces.setdefault(module, function.__globals__)
        names.update(dict.fromkeys(_names_in(function.__code__)))


@lru_cache(maxsize=4096)
def _names_in(code: CodeType) -> tuple[str, ...]:
    """The global names and attributes that a function uses, also in functions inside of it."""
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    own = [name for name in code.co_names if not hasattr(builtins, name)]
    return tuple(dict.fromkeys([*own, *(name for names in inner for name in names)]))


def _functions_of(value: Any) -> Iterator[FunctionType]:
    """The functions whose code an attribute runs: those that it wraps, and those that its closure calls."""
    if isinstance(value, property):
        value = value.fget
    for function in wrapped_chain(value):
        if isinstance(function, FunctionType):
            yield function
            for cell in function.__closure__ or ():
                try:
                    content = cell.cell_contents
                except ValueError:  # empty so far
                    continue
                if isinstance(content, FunctionType):
                    yield content


def _is_function(value: Any) -> bool:
    """True if an attribute computes something; modules count, since a script may replace them."""
    if isinstance(value, type):
        return False
    return callable(value) or isinstance(value, property | staticmethod | classmethod | ModuleType)


def _is_own(label: str, name: str, value: Any) -> bool:
    """True if a name in a module or class of a library refers to the library's own object."""
    if isinstance(value, ModuleType):
        return sys.modules.get(value.__name__) is value
    if isinstance(value, BuiltinFunctionType):
        return True
    function = value.fget if isinstance(value, property) else value
    if not is_library_function(function):
        return False
    # A function of a library in the place of another one.
    if label.startswith("transformers.") and label in sys.modules and name in _defined_functions(label):
        return getattr(function, "__module__", label) == label and getattr(function, "__name__", name) == name
    return True


@lru_cache(maxsize=256)
def _defined_functions(module_name: str) -> frozenset[str]:
    """The names of the functions that the file of a module defines at its top level, each once."""
    try:
        source = Path(str(sys.modules[module_name].__file__)).read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    return frozenset(re.findall(r"^def (\w+)", source, re.MULTILINE))
