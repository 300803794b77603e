"""Pairs for learning to summarize, read from the docstrings of installed packages: text -> first line."""

import ast
import re
from collections.abc import Iterator

from utils.data.records import Record
from utils.data.sources.python_sources import parse_source, source_files
from utils.errors import UserError

# The shortest text that is worth a summary.
MIN_TEXT_CHARACTERS = 100
# The shortest summary.
MIN_SUMMARY_WORDS = 3
# Two pairs never share a passage of this many consecutive words.
PASSAGE_WORDS = 8

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def read_summary_pairs(packages: list[str]) -> Iterator[Record]:
    """The pairs of some packages in a fixed order, as records with the fields `prompt` and `response`.

    A docstring gives a pair if it has the form of PEP 257: a summary of one line that ends in a period, an empty line,
    and a text. The text is the prompt, the summary the response.

    A pair is skipped if its summary, or a passage of `PASSAGE_WORDS` words, is in an earlier pair. Case, numbers and
    punctuation are ignored. Without this rule, a held-out row could be known from training.

    Raises:
        UserError: a package is not installed, or none of them gives a pair.
    """
    seen: set[int] = set()
    for path in source_files(packages, "data.summaries"):
        parsed = parse_source(path)
        for line_number, text, summary in _pairs_of(parsed[1]) if parsed is not None else ():
            passages = _passages(summary) | _passages(text)
            if not passages.isdisjoint(seen):
                continue
            seen |= passages
            yield Record(f"{path}:{line_number}", {"prompt": text, "response": summary})
    if not seen:
        raise UserError(
            f"data.summaries: no docstring with a summary line and a text below it in the sources of "
            f"{', '.join(packages)}: give other packages"
        )


def _pairs_of(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Line number, text and summary of each docstring of a file that has both."""
    for node in _documented_nodes(tree):
        docstring = ast.get_docstring(node)
        # "\ud800" in a docstring is half of a character, which cannot be tokenized.
        if docstring is None or any("\ud800" <= character <= "\udfff" for character in docstring):
            continue
        summary, _, rest = docstring.partition("\n")
        separator, _, text = rest.partition("\n")
        summary, text = summary.rstrip(), text.strip()
        is_summary = summary.endswith(".") and len(_words(summary)) >= MIN_SUMMARY_WORDS and not separator.strip()
        if is_summary and len(text) >= MIN_TEXT_CHARACTERS:
            yield node.body[0].lineno, text, summary


def _documented_nodes(node: ast.AST) -> Iterator[_Documented]:
    """The module and its classes and functions, nested ones included.

    Expressions are skipped: they are most of a tree and contain no docstrings.
    """
    if isinstance(node, _Documented):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler):
            yield from _documented_nodes(child)


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[^\W\d_]+", text.lower()))


def _passages(text: str) -> set[int]:
    """A hash of each passage. With passages of two words, "a b c" has "a b" and "b c". A short text is one passage."""
    words = _words(text)
    return {hash(words[start : start + PASSAGE_WORDS]) for start in range(max(1, len(words) - PASSAGE_WORDS + 1))}
