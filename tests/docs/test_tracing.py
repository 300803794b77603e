"""docs/tracing.md names every span, and no others."""

import re

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "tracing.md"
# A name is given to a span itself, to a mark of a transfer, or to a function that makes the span of a collective.
SPANS = (r'\b(?:span|_marked)\(\s*"(\w+)"', r'group(?:\("\w+"\))?, "(\w+)"\)')


def spans_of_the_source():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "moreh" / "runtime").rglob("*.py")]
    return {name for source in sources for pattern in SPANS for name in re.findall(pattern, source)}


def spans_of_the_page():
    """The names in the tables: in the first column of one, in the second of the other."""
    rows = [line.split("|")[1:3] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    cells = [second if re.match(r" `[td]p`| `pp`", first) else first for first, second in rows]
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_page_names_every_span():
    assert spans_of_the_source() == spans_of_the_page()


def test_files_of_the_page_exist():
    names = re.findall(r"`([\w/]+\.py)`", PAGE.read_text(encoding="utf-8"))
    files = [path.as_posix() for path in (ROOT / "moreh" / "runtime").rglob("*.py")]
    assert names
    missing = [name for name in names if not any(file.endswith(f"/{name}") for file in files)]
    assert not missing
