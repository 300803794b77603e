"""Finds where source code changes a library for the whole process: its modules, its classes and their attributes."""

import ast
from collections.abc import Iterator

from tests.helpers.source.source_tree import Source, assigned

# Methods that change a list, dictionary or set in place.
_MUTATORS = {
    "append",
    "extend",
    "insert",
    "remove",
    "update",
    "setdefault",
    "pop",
    "popitem",
    "clear",
    "add",
    "discard",
}
_READERS = {"getattr", "hasattr", "isinstance", "issubclass"}


def library_changes(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Each change of a library in a file: the node, and what is changed.

    These are:
    - `torch.name = ...`, also `+=`, `del`, through an alias, or through a parameter that a library's part is passed
      for,
    - `TABLE[...] = ...` and `TABLE.update(...)` for a table of a library,
    - `setattr(torch, ...)` and `delattr`,
    - `helper(torch, "name", ...)`, by which mocks and context managers replace an attribute,
    - `x.__class__ = ...` and `type(x).name = ...`, which change an object of a library behind its back,
    - imports of unittest.mock.
    """
    for node in source.nodes:
        for target in assigned(node):
            change = _changed_by_assignment(source, target)
            if change is not None:
                yield node, change
        if isinstance(node, ast.Call):
            change = _changed_by_call(source, node)
            if change is not None:
                yield node, change
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [getattr(node, "module", None), *(alias.name for alias in node.names)]
            if any(module and module.startswith(("unittest.mock", "mock")) for module in modules):
                yield node, "an import of mock"


def _changed_by_assignment(source: Source, target: ast.expr) -> str | None:
    if isinstance(target, ast.Attribute):
        if target.attr == "__class__":
            return f"{ast.unparse(target)}, the class of an object"
        if _is_type_of(target.value):
            return f"{ast.unparse(target)}, an attribute of a class"
        return source.library(target)
    if isinstance(target, ast.Subscript):
        name = source.library(_owner_of_table(target.value))
        return None if name is None else f"{name}[...]"
    return None


def _is_type_of(node: ast.expr) -> bool:
    """True if an expression is `type(x)` or `x.__class__`."""
    if isinstance(node, ast.Attribute):
        return node.attr == "__class__"
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "type"


def _owner_of_table(node: ast.expr) -> ast.expr:
    """For `vars(torch)`, torch itself."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "vars" and node.args:
        return node.args[0]
    return node


def _changed_by_call(source: Source, call: ast.Call) -> str | None:
    function = call.func
    if isinstance(function, ast.Attribute) and function.attr in _MUTATORS:
        name = source.library(_owner_of_table(function.value))
        # A module's function may have such a name; a table's name is in upper case or private, or is a __dict__.
        last = "" if name is None else name.rpartition(".")[2]
        return f"{name}.{function.attr}(...)" if last.isupper() or last.startswith("_") else None
    called = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
    if called in _READERS or len(call.args) < 2:
        return None
    owner = source.library(call.args[0])
    if owner is None:
        return None
    if called in ("setattr", "delattr"):
        return f"{called}({owner}, ...)"
    attribute = call.args[1]
    if isinstance(attribute, ast.Constant) and isinstance(attribute.value, str) and attribute.value.isidentifier():
        return f"{owner}.{attribute.value}, replaced by {called}"
    return None
