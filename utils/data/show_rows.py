"""Prints rows with their labels marked, for `--show-rows`."""

import sys
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from moreh.console.printable import printable
from moreh.tables import terminal_width, wrap_line
from utils.config.schema import Config
from utils.data.dataset import prepare_data
from utils.data.labels import IGNORED
from utils.data.records import MakePair
from utils.data.tokenization import MakeExample

MARKS = ("\u27e6", "\u27e7")
"""The marks around label tokens: mathematical brackets, which hardly any text has."""
_GREEN = ("\033[32m", "\033[0m")


def print_rows(config: Config, make_pair: MakePair, make_example: MakeExample, count: int) -> None:
    """Print the first training rows of a run, as the model gets them.

    Raises:
        UserError: the data or the tokenizer cannot be read.
    """
    data = prepare_data(config, make_pair, make_example, _say)
    print(f"{min(count, len(data.train))} of {len(data.train)} training rows; labels are in {''.join(MARKS)}:")
    for text in format_rows(data.train.select(range(min(count, len(data.train)))), data.tokenizer):
        print(f"\n{text}")


def _say(line: str) -> None:
    print(wrap_line(line, terminal_width(), indent=2), file=sys.stderr)


def format_rows(rows: Iterable[Mapping[str, Any]], tokenizer: Any) -> Iterable[str]:
    """The rows, each with its place, its number of tokens, and its text with the labels marked."""
    begin, end = (f"{_GREEN[0]}{MARKS[0]}", f"{MARKS[1]}{_GREEN[1]}") if sys.stdout.isatty() else MARKS
    for row in rows:
        tokens = list(zip(row["input_ids"], (label != IGNORED for label in row["labels"]), strict=True))
        labels = sum(is_label for _, is_label in tokens)
        text = ""
        for is_label, run in groupby(tokens, key=lambda token: token[1]):
            piece = printable(tokenizer.decode([token for token, _ in run]), kept="\n\t", mark="\ufffd")
            text += f"{begin}{piece}{end}" if is_label else piece
        yield f"--- {row['location']}: {len(tokens)} tokens, {labels} of them labels\n{text}"
