"""Pairs for learning to write code, read from the sources of installed packages: signature and docstring -> body."""

import ast
from collections.abc import Iterator
from pathlib import Path

from utils.data.records import Record
from utils.data.sources.python_sources import parse_source, source_files
from utils.errors import UserError


def read_docstring_pairs(packages: list[str]) -> Iterator[Record]:
    """The pairs of some packages in a fixed order, as records with the fields `prompt` and `response`.

    The prompt is the function's signature and docstring as the source has them, the response the rest of its body.
    Functions without a docstring, or with nothing but a docstring, are skipped; equal pairs are read once.

    Raises:
        UserError: a package is not installed, or none of them has such a function.
    """
    seen = set()
    for path in source_files(packages, "data.docstrings"):
        for line_number, prompt, response in _pairs_of_file(path):
            if (prompt, response) not in seen:
                seen.add((prompt, response))
                yield Record(f"{path}:{line_number}", {"prompt": prompt, "response": response})
    if not seen:
        raise UserError(f"data.docstrings: no function with a docstring in the sources of {', '.join(packages)}")


def _pairs_of_file(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, prompt and response of each function that gives a pair; none of a file that does not parse."""
    parsed = parse_source(path)
    if parsed is None:
        return
    source, tree = parsed
    # Lines as the parser counts them: str.splitlines would also split at form feeds and other separators.
    lines = [line + "\n" for line in source.split("\n")]
    for function in _functions(tree):
        if ast.get_docstring(function) is None:
            continue
        docstring_end = function.body[0].end_lineno
        if len(function.body) < 2 or docstring_end is None or function.body[1].lineno <= docstring_end:
            continue
        # lineno is the line of `def`, so decorators are left out; end_lineno is inclusive.
        prompt = _dedent(lines[function.lineno - 1 : docstring_end], function.col_offset)
        response = _dedent(lines[docstring_end : function.end_lineno], function.col_offset)
        yield function.lineno, prompt, response.rstrip() + "\n"


def _functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions of a module and of its classes, without those inside other functions.

    An inner function is part of the outer one's body, so it could be held out for evaluation and still be trained on.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        else:
            yield from _functions(child)


def _dedent(lines: list[str], width: int) -> str:
    """The lines without `width` columns of indentation. A less indented line of a string loses only its indentation."""
    return "".join(line[width:] if not line[:width].strip() else line.lstrip() for line in lines)
