"""Shared parts of the command-line tools: argument types, help format, questions, errors."""

import argparse
import io
import math
import sys
from collections.abc import Callable
from functools import partial

from moreh.accelerator.this_machine import listed_models
from moreh.console.output import flush_output, say
from moreh.console.printable import printable
from moreh.errors import MorehError
from moreh.tables import terminal_width

# argparse ends with 2 when the command line itself is wrong.
EXIT_REFUSED = 1


class QuestionAborted(MorehError):
    """Standard input ended, or the user asked to leave, before a question was answered."""


def run_tool(main: Callable[[list[str]], int]) -> int:
    """Run a tool's main function; a refusal becomes one line on standard error and exit code 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a job's command line may hold what the terminal cannot show
    try:
        code = main(sys.argv[1:])
        failure = flush_output()  # here, not when Python ends and can only fail
        if failure is not None:
            raise failure
        return code
    except MorehError as error:
        text = printable(str(error), kept="\n")
        say(f"error: {text}")
        return EXIT_REFUSED
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        return EXIT_REFUSED
    except OSError as error:
        what = "standard output" if error.filename is None else error.filename
        say(f"error: {what}: {error.strerror or error}")
        return EXIT_REFUSED
    finally:
        flush_output()


def whole_number(maximum: int) -> Callable[[str], int]:
    """The type of an option: a whole number from 1 to `maximum`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or len(text) > 12 or not 1 <= int(text) <= maximum:
            raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1 to {maximum:,}")
        return int(text)

    return parse


def positive_number(maximum: float, unit: str = "") -> Callable[[str], float]:
    """The type of an option: a number above 0, at most `maximum`, of a unit that its errors name."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= maximum:
            number = f"number of {unit}" if unit else "number"
            raise argparse.ArgumentTypeError(f"{text}: give a {number} above 0, at most {maximum:g}")
        return value

    return parse


def help_formatter() -> Callable[..., argparse.HelpFormatter]:
    """The formatter of --help: as wide as the terminal; it leaves the lines of description and epilog as they are."""
    return partial(argparse.RawDescriptionHelpFormatter, max_help_position=26, width=terminal_width())


def ask(question: str, answer: Callable[[str], str | None]) -> str | None:
    """Ask until `answer` returns a text, and print why each unusable one is refused; None when the user enters q or Q.

    Raises:
        QuestionAborted: standard input ended.
    """
    while True:
        try:
            entered = input(question).strip()
        except EOFError:
            print()
            raise QuestionAborted("no answer on standard input: give the value as an argument") from None
        if entered in {"q", "Q"}:
            return None
        try:
            accepted = answer(entered)
        except MorehError as error:
            print(error)
            continue
        if accepted is not None:
            return accepted


def print_models(current: str | None) -> None:
    """The numbered list of models, `*` at the current one."""
    for number, flavor in listed_models().items():
        mark = "  *" if flavor.name == current else ""
        print(f"{number}. {flavor.name}{mark}")


def selection_question() -> str:
    """The question that follows the numbered list."""
    numbers = list(listed_models())
    return f"Selection ({numbers[0]}-{numbers[-1]}, q, Q): "
