"""Write docs/conformance.md, the table of all patterns: `python -m tests.conformance.page`."""

from collections import Counter
from itertools import groupby
from pathlib import Path

from tests.conformance.patterns import KINDS, read_patterns

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"

INTRODUCTION = """\
# Conformance

The table lists what scripts do, and what the line makes of it.
Each row is a script of a few lines, in `tests/conformance/scripts/`.

```bash slow
make conformance                                              # all of them
python -m tests.conformance losses --only z-loss --verbose    # one of them
```

The command runs each script without the line, and with it on 1, 2 and 4 workers, in float32.
It compares the values that the script names, what it prints, the files that it writes, and the exception that ends it.
On several workers, the scripts take turns with plans of each kind: tensor, pipeline and data parallel, and sharded.

- *equal*: the same, to rounding: 1e-5 of the largest number of a tensor, unless the script's entry says otherwise.
- *refused*: an error ends the script, with the words in the table.
- *differs*: a difference that the documentation states.

The command fails if a row comes out in any other way, so a refusal or a difference that has gone is found too.
"""


def page(patterns):
    """The text of the page."""
    counts = {where: Counter(getattr(pattern, where).kind for pattern in patterns) for where in ("one", "several")}
    lines = [INTRODUCTION, f"| {len(patterns)} patterns | {' | '.join(KINDS)} |", "|---|" + "---|" * len(KINDS)]
    for where, name in (("one", "1 worker"), ("several", "several workers")):
        lines.append(f"| {name} | {' | '.join(str(counts[where][kind]) for kind in KINDS)} |")
    for group, members in groupby(patterns, key=lambda pattern: pattern.group):
        lines += ["", f"## {group.replace('_', ' ').capitalize()}", ""]
        lines += ["| pattern | the script | 1 worker | several workers |", "|---|---|---|---|"]
        lines += [
            f"| `{pattern.name}` | {_cell(pattern.what)} | {_cell(pattern.one)} | {_cell(pattern.several)} |"
            for pattern in members
        ]
    return "\n".join(lines) + "\n"


def _cell(value):
    return str(value).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(read_patterns()), encoding="utf-8")
    print(f"wrote {PAGE}")
