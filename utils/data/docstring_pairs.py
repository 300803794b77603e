"""Pairs for learning to write code, read from the sources of installed packages: signature and docstring -> body."""

import ast
from collections.abc import Iterator
from pathlib import Path

from utils.data.file_readers import Record
from utils.data.python_sources import parse_source, source_files
from utils.errors import UserError


def read_docstring_pairs(packages: list[str]) -> Iterator[Record]:
    """The pairs of some packages, in a fixed order, with the fields `prompt` and `response`.

    The prompt is the function's signature and docstring as they stand in the source, the response the rest of its body.
    Functions without a docstring, or with nothing else, give none. Equal pairs are given once.

    Raises:
        UserError: a package is not installed, or none of them gives a pair.
    """
    seen = set()
    for path in source_files(packages, "data.docstrings"):
        for line, prompt, response in _pairs_of_file(path):
            if (prompt, response) not in seen:
                seen.add((prompt, response))
                yield f"{path}:{line}", {"prompt": prompt, "response": response}
    if not seen:
        raise UserError(f"data.docstrings: no function with a docstring in the sources of {', '.join(packages)}")


def _pairs_of_file(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, prompt and response for each function of a file that has them. Files that do not parse give none."""
    parsed = parse_source(path)
    if parsed is None:
        return
    source, tree = parsed
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
