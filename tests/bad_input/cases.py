"""The table of bad inputs: command lines and files, each with its exit code and words of the line that a user reads.

The table is the YAML files of this folder. A case has

    tool       train, plan, smi, switch, generate, export or report
    arguments  of the command line; {dir} stands for the directory of the case
    says       words of what is written on standard error
    code       the exit code; 2 if left out
    input      what is read from standard input
    copy       model, run or checkpoint: the case has a copy of the tiny run's, named like this
    files      files to write, by path: a text, bytes, or {repeat: a text, times: a number}
    set        keys to change in a JSON file, by path; a key of null is removed
    remove     files to remove
    cut        files to shorten to so many bytes, by path
    flip       files in which to flip the bits of one byte, by path
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """A bad input."""

    tool: str
    says: str
    arguments: list[str] = field(default_factory=list)
    code: int = 2
    input: str = ""
    copy: str = ""
    files: dict[str, Any] = field(default_factory=dict)
    set: dict[str, dict[str, Any]] = field(default_factory=dict)
    remove: list[str] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    flip: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What a failed test is called."""
        changed = [*self.files, *self.remove, *self.cut, *self.flip, *(f"{k} {v}" for k, v in self.set.items())]
        return " ".join([self.tool, *self.arguments, *changed])[:110]

    def prepare(self, directory: Path, sources: dict[str, Path]) -> list[str]:
        """Make the files of the case; returns its command line. `sources` are the directories that cases copy."""
        if self.copy:
            name = "step-4" if self.copy == "checkpoint" else self.copy
            shutil.copytree(sources[self.copy], directory / name)
        for name, content in self.files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, dict):
                content = content["repeat"] * content["times"]
            path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        for name, changes in self.set.items():
            content = json.loads((directory / name).read_text(encoding="utf-8")) | changes
            kept = {key: value for key, value in content.items() if value is not None}
            (directory / name).write_text(json.dumps(kept), encoding="utf-8")
        for name in self.remove:
            path = directory / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, size in self.cut.items():
            (directory / name).write_bytes((directory / name).read_bytes()[:size])
        for name, place in self.flip.items():
            content = bytearray((directory / name).read_bytes())
            content[place] ^= 255
            (directory / name).write_bytes(bytes(content))
        return [argument.replace("{dir}", str(directory)) for argument in self.arguments]


def all_cases() -> list[Case]:
    """The table."""
    paths = sorted(FOLDER.glob("*.yaml"))
    return [Case(**case) for path in paths for case in yaml.safe_load(path.read_text(encoding="utf-8"))]
