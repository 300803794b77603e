"""Write docs/conformance.md, the table of all patterns: `python -m tests.conformance.page`."""

from collections import Counter
from itertools import groupby
from pathlib import Path

from tests.conformance.patterns import KINDS, read_patterns

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"

INTRODUCTION = """\
# Conformance

The tables list patterns of training scripts, and the result of each pattern with the line.
Each row is a script of a few lines in `tests/conformance/scripts/`.

```bash slow
make conformance                                              # all of them
python -m tests.conformance losses --only z-loss --verbose    # one of them
```

The command runs each script without the line, and with it on 1, 2 and 4 workers, in float32.
It compares the values that the script names, its output, the files that it writes, and its exception, if any.
On several workers, the plans alternate: tensor, pipeline and data parallel, and sharded.

- *equal*: equal to rounding, 1e-5 of the largest number in a tensor unless the script's entry sets another tolerance.
- *refused*: the script ends with an error that contains the words in the table.
- *differs*: a documented difference.

The command fails if a row has any other result, so outdated entries are found too.
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
