"""Pairs for learning to summarize, read from the sources of installed packages: text of a docstring -> its first line."""

import ast
import re
from collections.abc import Iterator

from utils.data.file_readers import Record
from utils.data.python_sources import parse_source, source_files
from utils.errors import UserError

# Of a text that is worth a summary, and of a summary.
MIN_CHARACTERS, MIN_WORDS = 100, 3
# No so many words in a row occur in two pairs.
PASSAGE_WORDS = 8

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def read_summary_pairs(packages: list[str]) -> Iterator[Record]:
    """The pairs of some packages, in a fixed order, with the fields `prompt` and `response`.

    A docstring gives one if it is written as PEP 257 says: a summary that is one line and ends in a period, an empty
    line, and a text. The prompt is the text, the response the summary. What shares a summary, or any passage of
    `PASSAGE_WORDS` words, with an earlier pair is left out: compared are words alone, without case, numbers and
    punctuation. So no row that is held out is known from training.

    Raises:
        UserError: a package is not installed, or none of them gives a pair.
    """
    passages: set[int] = set()
    for path in source_files(packages, "data.summaries"):
        parsed = parse_source(path)
        for line, text, summary in _pairs_of(parsed[1]) if parsed is not None else ():
            here = _passages(summary) | _passages(text)
            if not here.isdisjoint(passages):
                continue
            passages |= here
            yield f"{path}:{line}", {"prompt": text, "response": summary}
    if not passages:
        raise UserError(
            f"data.summaries: no docstring with a summary line and a text below it in the sources of {', '.join(packages)}: "
            "give other packages"
        )


def _pairs_of(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Line number, text and summary of each docstring of a file that has both."""
    for node in _with_docstring(tree):
        docstring = ast.get_docstring(node)
        # "\ud800" in a docstring is half of a character, which cannot be tokenized.
        if docstring is None or any("\ud800" <= character <= "\udfff" for character in docstring):
            continue
        summary, _, rest = docstring.partition("\n")
        empty, _, text = rest.partition("\n")
        summary, text = summary.rstrip(), text.strip()
        is_summary = summary.endswith(".") and len(_words(summary)) >= MIN_WORDS and not empty.strip()
        if is_summary and len(text) >= MIN_CHARACTERS:
            yield node.body[0].lineno, text, summary


def _with_docstring(node: ast.AST) -> Iterator[Documented]:
    """The module, and the classes and functions in it, also those inside other ones. Expressions, which have none, are many."""
    if isinstance(node, Documented):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler):
            yield from _with_docstring(child)


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[^\W\d_]+", text.lower()))


def _passages(text: str) -> set[int]:
    """A number for each run of words: a b c with runs of two gives those of (a, b) and (b, c). A shorter text is one run."""
    words = _words(text)
    return {hash(words[start : start + PASSAGE_WORDS]) for start in range(max(1, len(words) - PASSAGE_WORDS + 1))}
