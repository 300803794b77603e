"""Makes untrusted text, such as command lines of other processes, safe for a terminal or a log."""

# The most characters of another process's command in a sentence.
COMMAND_CHARACTERS = 80


def printable(text: str, kept: str = "", mark: str = "?") -> str:
    """The text with `mark` for control characters and others that a terminal cannot show, except those of `kept`."""
    return "".join(character if character.isprintable() or character in kept else mark for character in text)


def in_one_line(text: str, width: int = COMMAND_CHARACTERS) -> str:
    """A text in one line of at most `width` characters; dots replace the end."""
    shown = printable(text[: width + 1])
    return shown if len(shown) <= width else shown[: width - 3] + "..."
