"""Finds private names of libraries in source code: what has a leading underscore and is not this project's own."""

import ast
from collections.abc import Iterable, Iterator

from tests.helpers.source.source_tree import LIBRARIES, Source

# Private names of Python's own library.
_PYTHON = {"_asdict", "_exit", "_getframe", "_replace"}


def private_names_of_libraries(sources: Iterable[Source]) -> Iterator[tuple[Source, ast.AST, str]]:
    """Each use of a private name of a library: file, node and name.

    The name is dotted where the source says whose it is, such as torch._C._current_graph_task_id, and begins with a dot
    where it does not, such as ._version of some tensor.
    """
    sources = tuple(sources)
    own = {name for source in sources for name in _defined(source)}
    for source in sources:
        for node in source.nodes:
            for name in _private_names(source, node, own):
                yield source, node, name


def _private_names(source: Source, node: ast.AST, own: set[str]) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
        names = (f"{node.module}.{alias.name}" for alias in node.names)
        yield from (name for name in names if any(map(_is_private, name.split("."))))
    elif isinstance(node, ast.Attribute) and not isinstance(next(source.enclosing(node)), ast.Attribute):
        # Of a chain of attributes, the outermost one.
        name = source.dotted(node)
        if name is None:
            yield from _private_tail(node, own)
        elif source.library(node) is not None and any(map(_is_private, name.split("."))):
            yield name


def _private_tail(node: ast.Attribute, own: set[str]) -> Iterator[str]:
    """Of a chain of attributes, the part from its first private name to its last: ._version of x.data._version.real."""
    attributes: list[str] = []
    value: ast.expr = node
    while isinstance(value, ast.Attribute):
        attributes.insert(0, value.attr)
        value = value.value
    private = [
        index
        for index, name in enumerate(attributes)
        if _is_private(name) and (name not in own or (index == 0 and _is_super(value)))
    ]
    if private:
        yield "." + ".".join(attributes[private[0] : private[-1] + 1])


def _defined(source: Source) -> Iterator[str]:
    """The names that a file defines or assigns to `self`."""
    for node in source.nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "object.__setattr__":
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in _PYTHON


def _is_super(node: ast.expr) -> bool:
    """True if an expression is `super()`: a private method that is called there is a library's."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def is_covered(name: str, listed: Iterable[str]) -> bool:
    """True if a private name, or a part that contains it, is among the listed ones.

    A class may be imported from more than one module, so its name and what follows are enough.
    """
    parts = name.split(".")
    first_private = next(index for index, part in enumerate(parts) if _is_private(part))
    tail = name if name.startswith(".") else "." + ".".join(parts[max(first_private - 1, 0) :])
    listed = [entry.replace(":", ".") for entry in listed]
    return any(
        entry.endswith(tail) or f"{name}.".startswith(f"{entry}.") or f"{entry}.".startswith(f"{name}.")
        for entry in listed
    )
