"""Pairs for learning to write code, read from the sources of installed packages: signature and docstring -> body."""

import ast
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError
from utils.records import Record

STANDARD_LIBRARY = "stdlib"
_LEFT_OUT = {"test", "tests", "testing", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


def read_docstring_pairs(packages: list[str]) -> Iterator[Record]:
    """The pairs of some packages, in a fixed order, with the fields `prompt` and `response`.

    The prompt is the function's signature and docstring as they stand in the source, the response the rest of its body.
    Functions without a docstring, or with nothing else, give none. Equal pairs are given once.

    Raises:
        UserError: a package is not installed, or none of them gives a pair.
    """
    seen = set()
    for path in source_files(packages):
        for line, prompt, response in _pairs_of_file(path):
            if (prompt, response) not in seen:
                seen.add((prompt, response))
                yield f"{path}:{line}", {"prompt": prompt, "response": response}
    if not seen:
        raise UserError(f"data.docstrings: no function with a docstring in the sources of {', '.join(packages)}")


def source_files(packages: list[str]) -> list[Path]:
    """The Python files of some packages, tests left out.

    Raises:
        UserError: a package is not installed.
    """
    files = []
    for package in packages:
        directory = _source_directory(package)
        files += [p for p in sorted(directory.rglob("*.py")) if _LEFT_OUT.isdisjoint(p.relative_to(directory).parts)]
    return files


def _source_directory(package: str) -> Path:
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib"))
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"data.docstrings: there is no installed package {package!r}: give names of packages (not of modules), or "
            f"{STANDARD_LIBRARY!r} for Python's own library"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _pairs_of_file(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, prompt and response for each function of a file that has them. Files that do not parse give none."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in other people's sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError, OSError):
        return
    # As the parser counts lines; str.splitlines would also split at form feeds and other separators.
    lines = [line + "\n" for line in source.split("\n")]
    for node in _functions(tree):
        if ast.get_docstring(node) is None:
            continue
        docstring_end = node.body[0].end_lineno
        if len(node.body) < 2 or docstring_end is None or node.body[1].lineno <= docstring_end:
            continue
        indent = node.col_offset
        # lineno is the line of `def`, so decorators are not part of it; end_lineno is inclusive.
        prompt = _without_indent(lines[node.lineno - 1 : docstring_end], indent)
        response = _without_indent(lines[docstring_end : node.end_lineno], indent)
        yield node.lineno, prompt, response.rstrip() + "\n"


def _functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions of a module and of its classes. One inside another function is part of that one's body, so it could be
    held out for evaluation and yet be seen in training."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        else:
            yield from _functions(child)


def _without_indent(lines: list[str], width: int) -> str:
    """The lines moved to the left by `width` columns; a line of a string that has less white space keeps its text."""
    return "".join(line[width:] if not line[:width].strip() else line.lstrip() for line in lines)
