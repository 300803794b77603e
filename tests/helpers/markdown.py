"""The pages of the documentation, their code blocks and links."""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(.*)$")
_GENERATED = re.compile(r"^<!-- (\w+): (generated|end) -->$")


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    page: Path
    line: int
    """The line of its opening fence, from 1."""
    language: str
    """The words after the fence, such as "bash" or "bash slow"."""
    text: str


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page."""
    result: list[Block] = []
    opened: tuple[int, str] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = _FENCE.match(line)
        if fence is None:
            lines.append(line)
        elif opened is None:
            opened, lines = (number, fence[1].strip()), []
        else:
            result.append(Block(page, *opened, "\n".join(lines)))
            opened = None
    assert opened is None, f"{page.name}:{opened[0]}: this code block has no end"
    return result


def commands(block: Block) -> list[str]:
    """The commands of a shell block, without comments, continued lines joined."""
    text = block.text.replace("\\\n", " ")
    stripped = (re.sub(r"\s+# .*$", "", line).strip() for line in text.splitlines())
    return [line for line in stripped if line and not line.startswith("#")]


def prose_lines(page: Path) -> list[tuple[int, str]]:
    """The numbered lines of a page outside of code blocks and of what a command has written."""
    result, inside = [], False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if _FENCE.match(line) or _GENERATED.match(line):
            inside = not inside
        elif not inside:
            result.append((number, line))
    return result


def generated(page: Path, name: str) -> str:
    """The output of a command in a page, between two comments that name the command."""
    text = page.read_text(encoding="utf-8")
    start, end = f"<!-- {name}: generated -->", f"<!-- {name}: end -->"
    assert start in text, f"{page.name} has no line {start}"
    return text.partition(start)[2].partition(end)[0].strip()


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures that are files of the repository."""
    found = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    return [target.partition("#")[0] for target in found if "://" not in target and not target.startswith("#")]
