"""Reads a prompt as data files are read: UTF-8, without a byte order mark, with "\\n" between lines."""

import argparse
import io
import sys
from typing import IO

from utils.config.section import expand_home
from utils.errors import UserError


def read_prompt(arguments: argparse.Namespace) -> str:
    """The prompt of the command line, of `--file`, or of standard input.

    Raises:
        UserError: there are two, there is none, or it is not UTF-8.
    """
    if arguments.prompt is not None and arguments.file is not None:
        raise UserError("give the prompt on the command line or in --file, not both")
    if arguments.prompt is not None:
        # A line break is hard to type in a shell.
        return checked_argument(arguments.prompt, "the prompt").replace("\\n", "\n")
    if arguments.file is not None:
        try:
            with open(expand_home(arguments.file), "rb") as file:  # noqa: PTH123
                return _decode(file, f"--file: {arguments.file}")
        except OSError as error:
            raise UserError(f"--file: {arguments.file} cannot be read: {error}") from error
    if sys.stdin is None:
        raise UserError("standard input is closed: give the prompt on the command line or in --file")
    if sys.stdin.isatty():
        print("Prompt (end with Ctrl-D):", file=sys.stderr)
    return _decode(sys.stdin.buffer, "standard input")


def checked_argument(text: str, label: str) -> str:
    """An argument of the command line, in which Python marks bytes that are not UTF-8.

    Raises:
        UserError: it has such bytes.
    """
    wrong = next((character for character in text if "\ud800" <= character <= "\udfff"), None)
    if wrong is not None:
        raise UserError(
            f"{label} is not UTF-8 text: it has the byte {ord(wrong) & 0xFF:#04x}: type it on a UTF-8 console, or "
            "give it as a UTF-8 file with --file"
        )
    return text


def _decode(file: IO[bytes], label: str) -> str:
    try:
        return io.TextIOWrapper(io.BytesIO(file.read()), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{label} cannot be read: not UTF-8 text: byte {error.start} is {byte:#04x}: convert it, for example with "
            "iconv -t utf-8"
        ) from None
