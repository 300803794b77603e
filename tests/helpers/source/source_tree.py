"""Reads the project's own source: what each file imports, assigns and calls, by the full dotted names of libraries."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent.parent
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub")
_SCOPES = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


class Source:
    """A parsed file, with what its names stand for: imports, and plain aliases of parts of libraries."""

    def __init__(self, text: str, path: str = "example.py") -> None:
        self.path = path
        self.tree = ast.parse(text)
        self.nodes = list(ast.walk(self.tree))
        self._functions = [node for node in self.nodes if isinstance(node, ast.FunctionDef)]
        self._parents = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}
        # The scopes with their names, such as dist -> torch.distributed.
        self._names: dict[ast.AST, dict[str, str]] = {node: {} for node in self.nodes if isinstance(node, _SCOPES)}
        for node in self.nodes:
            self._add_import(node)
        for _ in range(3):  # an alias of an alias, and a parameter that is passed on
            for node in self.nodes:
                self._add_aliases(node)

    def dotted(self, node: ast.AST) -> str | None:
        """The dotted name of an expression that starts from an import, such as torch.nn.Module; None for others."""
        if isinstance(node, ast.Name):
            return next((names[node.id] for names in self._visible(node) if node.id in names), None)
        if isinstance(node, ast.Attribute):
            owner = self.dotted(node.value)
            return None if owner is None else f"{owner}.{node.attr}"
        return None

    def library(self, node: ast.AST) -> str | None:
        """The dotted name of an expression that is part of a library; None for others."""
        name = self.dotted(node)
        return name if name is not None and name.split(".")[0] in LIBRARIES else None

    def enclosing(self, node: ast.AST) -> Iterator[ast.AST]:
        """The nodes around a node, from the inside to the module."""
        while node in self._parents:
            node = self._parents[node]
            yield node

    def place(self, node: ast.AST) -> str:
        """Where a node is, as path:line."""
        return f"{self.path}:{getattr(node, 'lineno', '?')}"

    def _visible(self, node: ast.AST) -> Iterator[dict[str, str]]:
        """The names of the scopes around a node, from the inside to the module."""
        return (self._names[scope] for scope in self.enclosing(node) if scope in self._names)

    def _add_import(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.split(".")[0]
                next(self._visible(node))[name] = alias.name if alias.asname else name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                next(self._visible(node))[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def _add_aliases(self, node: ast.AST) -> None:
        """Add aliases: `name = torch.nn.Module`, `for name in (torch, torch.fft)`, `function(torch.nn.Module)`."""
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            self._add_alias(node, node.targets[0], node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self._add_alias(node, node.target, node.value)
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple | ast.List):
            for item in node.iter.elts:
                self._add_alias(node, node.target, item)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            for function in self._functions:
                if function.name == node.func.id:
                    parameters = [*function.args.posonlyargs, *function.args.args]
                    for parameter, argument in zip(parameters, node.args, strict=False):
                        name = self.library(argument)
                        if name is not None:
                            self._names[function].setdefault(parameter.arg, name)

    def _add_alias(self, statement: ast.AST, target: ast.AST, value: ast.AST) -> None:
        name = self.library(value)
        if isinstance(target, ast.Name) and name is not None:
            next(self._visible(statement)).setdefault(target.id, name)


@cache
def sources(*directories: str) -> tuple[Source, ...]:
    """The parsed Python files of some directories of the project; "." stands for the scripts in its root."""
    paths: list[Path] = []
    for directory in directories:
        paths += sorted((ROOT / directory).glob("*.py") if directory == "." else (ROOT / directory).rglob("*.py"))
    return tuple(Source(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()) for path in paths)


def assigned(node: ast.AST) -> Iterator[ast.expr]:
    """The targets that a statement assigns to or deletes."""
    if isinstance(node, ast.Assign | ast.Delete):
        targets = list(node.targets)
    elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.For):
        targets = [node.target]
    else:
        return
    while targets:
        target = targets.pop()
        if isinstance(target, ast.Tuple | ast.List):
            targets += target.elts
        elif isinstance(target, ast.Starred):
            targets.append(target.value)
        else:
            yield target
