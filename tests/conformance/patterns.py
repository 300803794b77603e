"""The patterns of the suite: entries of the YAML files in `scripts/`, one file for each group.

An entry has these keys:

- `name`: unique in the suite.
- `what`: what the script does, a line for docs/conformance.md.
- `script`: the script. The harness replaces its comment `# LINE` by the line, or by nothing in the plain run.
  A script without the comment follows `HEADER`, which has it.
- `one`, `several`: what is expected on one worker and on several: `equal` (the default), `refused: words of the
  message`, or `differs: the difference, as the documentation states it`.
- `raises`: the class of the error that ends the script without the line; none by default.
- `tolerance`: of numbers, relative; 1e-5 by default.
- `options`: of the line, such as `num_micro_batches=2`; by default there is only `mixed_precision=False`.
- `plans`: the plans that several workers carry out, names of `plans.PLANS`, where the harness must not choose.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from tests.conformance.plans import PLANS

SCRIPTS = Path(__file__).parent / "scripts"
MARK = "# LINE"
HEADER = f"from tests.conformance.prelude import *\n\n{MARK}\n"
TOLERANCE = 1e-5
KINDS = ("equal", "refused", "differs")


@dataclass(frozen=True)
class Expectation:
    """The expected outcome of a run with the line, compared with the run without."""

    kind: Literal["equal", "refused", "differs"]
    words: str = ""
    """Words of the error's message, or the difference as the documentation states it."""

    def __str__(self):
        return f"{self.kind}: {self.words}" if self.words else self.kind


@dataclass(frozen=True)
class Pattern:
    """A pattern of users' scripts."""

    group: str
    """The name of its file."""
    name: str
    what: str
    """A description of the script, in a line."""
    script: str
    """The source, with `MARK` where the line is called."""
    one: Expectation
    """The expected outcome on one worker."""
    several: Expectation
    """The expected outcome on several workers."""
    raises: str = ""
    """The class of the error that ends the plain run; empty if it runs to its end."""
    tolerance: float = TOLERANCE
    """The largest relative difference of numbers."""
    options: str = ""
    """The options of the line, besides `mixed_precision=False`."""
    plans: tuple[str, ...] = ()
    """The plans for several workers; empty if the harness chooses."""

    def source(self, *, with_line):
        """The source of the script, with the line or without."""
        options = ", ".join(filter(None, ["mixed_precision=False", self.options]))
        line = f"import torch; torch.moreh.option.enable_advanced_parallelization({options})" if with_line else ""
        return self.script.replace(MARK, line)

    def expectation(self, workers):
        """The expected outcome on a number of workers."""
        return self.one if workers == 1 else self.several


def groups():
    """The names of the groups."""
    return sorted(path.stem for path in SCRIPTS.glob("*.yaml"))


def read_patterns(names=()):
    """The patterns of some groups, or of all.

    Raises:
        ValueError: an entry is wrong, or two entries have one name.
    """
    patterns = []
    for group in names or groups():
        entries = yaml.safe_load((SCRIPTS / f"{group}.yaml").read_text(encoding="utf-8"))
        patterns += [parse(group, entry) for entry in entries]
    seen = set()
    for pattern in patterns:
        if pattern.name in seen:
            raise ValueError(f"{pattern.group}: two patterns are named {pattern.name}")
        seen.add(pattern.name)
    return patterns


def parse(group, entry):
    """The pattern of an entry.

    Raises:
        ValueError: a key is missing or unknown, or a value is not allowed.
    """
    where = f"{group}.yaml, {entry.get('name')}"
    known = {"name", "what", "script", "one", "several", "raises", "tolerance", "options", "plans"}
    if missing := {"name", "what", "script"} - entry.keys():
        raise ValueError(f"{where}: keys are missing: {sorted(missing)}")
    if unknown := entry.keys() - known:
        raise ValueError(f"{where}: unknown keys: {sorted(unknown)}")
    script = entry["script"]
    if script.count(MARK) > 1:
        raise ValueError(f"{where}: the script has {MARK} more than once")
    plans = tuple(entry.get("plans", ()))
    if wrong := set(plans) - PLANS.keys():
        raise ValueError(f"{where}: plans are {', '.join(PLANS)}, not {sorted(wrong)}")
    return Pattern(
        group,
        entry["name"],
        " ".join(entry["what"].split()),
        script if MARK in script else HEADER + script,
        _expectation(where, entry.get("one", "equal")),
        _expectation(where, entry.get("several", "equal")),
        entry.get("raises", ""),
        float(entry.get("tolerance", TOLERANCE)),
        entry.get("options", ""),
        plans,
    )


def _expectation(where, value):
    ((kind, words),) = value.items() if isinstance(value, dict) else [(value, "")]
    if kind not in KINDS or (kind != "equal") != bool(words):
        raise ValueError(f"{where}: {value!r}: write equal, or refused or differs with words")
    return Expectation(kind, " ".join(words.split()))
