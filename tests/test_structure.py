"""Files and folders stay small enough to be read."""

import ast
import re
import subprocess
from collections import Counter
from pathlib import PurePath

import pytest

from tests.helpers.source.source_tree import ROOT

MAX_LINES = 300
MAX_FILES = 14
TOP_FOLDERS = {".ci", ".github", "benchmarks", "configs", "docs", "examples", "moreh", "scripts", "tests", "utils"}
# Folders of like things: one file for each family of transformers.
FOLDERS_OF_LIKE_THINGS = {"moreh/models/families"}


def python_files():
    """The lines of each Python file of the checkout, by path."""
    folders = ["moreh", "utils", "scripts", "benchmarks", "examples", "tests"]
    paths = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text().count("\n") for path in paths}


def long_files(lines_by_path):
    return {path: lines for path, lines in lines_by_path.items() if lines > MAX_LINES}


def full_folders(paths):
    folders = Counter(PurePath(path).parent.as_posix() for path in paths)
    return {
        folder: files for folder, files in folders.items() if files > MAX_FILES and folder not in FOLDERS_OF_LIKE_THINGS
    }


def strange_folders(paths):
    return {PurePath(path).parts[0] for path in paths if "/" in path} - TOP_FOLDERS


def questions(text):
    """First lines of docstrings that begin like a question, which the style of CONTRIBUTING.md excludes."""
    return re.findall(r'^\s*r?"""((?:What|Whether|Which|Why|Who) .*)', text, re.MULTILINE)


def test_no_run_is_left_among_the_tracked_files():
    """A test or a command that trains into the checkout leaves a folder, which `git add` then takes."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the git repository")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    strange = strange_folders(tracked.strip("\0").split("\0"))
    assert not strange, f"folders that are none of the project's: {strange}. Delete them, or add them to TOP_FOLDERS"


def test_strange_folder_is_seen():
    assert strange_folders(["moreh/log.py", "README.md", "null/tiny/run.json"]) == {"null"}


def test_files_are_short():
    long = long_files(python_files())
    assert not long, f"files of more than {MAX_LINES} lines: {long}. Split them by purpose"


def test_folders_have_few_files():
    full = full_folders(python_files())
    assert not full, f"folders of more than {MAX_FILES} Python files: {full}. Make packages of them"


@pytest.mark.parametrize(("lines", "is_long"), [(MAX_LINES, False), (MAX_LINES + 1, True)])
def test_long_file_is_seen(lines, is_long):
    assert bool(long_files({"moreh/x.py": lines})) == is_long


@pytest.mark.parametrize(("files", "is_full"), [(MAX_FILES, False), (MAX_FILES + 1, True)])
def test_full_folder_is_seen(files, is_full):
    assert bool(full_folders([f"moreh/x/{number}.py" for number in range(files)])) == is_full


def test_docstrings_are_no_questions():
    paths = [path for path in python_files() if not path.startswith("tests/") or path.startswith("tests/helpers/")]
    found = {path: questions((ROOT / path).read_text()) for path in paths}
    assert not any(found.values()), f"begin with a noun or True if: { ({path: q for path, q in found.items() if q}) }"


def test_question_is_seen():
    assert questions('def f():\n    """Whether it rains."""\n') == ['Whether it rains."""']
    assert not questions('def f():\n    """True if it rains: whether it snows is unknown."""\n')


def test_accelerators_are_asked_for_where_they_are_there():
    """A CUDA build of torch names an accelerator on a machine without a GPU, too."""
    unchecked = "current_accelerator" + "()"
    assert not [path for path in python_files() if unchecked in (ROOT / path).read_text()]


def without_import_path(source):
    """The modules of the checkout that a script imports before it has put the checkout on the import path."""
    tree = ast.parse(source)
    path_lines = [
        node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt) and "sys.path" in ast.unparse(node)
    ]
    return {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and str(node.module).split(".")[0] in ("utils", "tests")
        and not any(line < node.lineno for line in path_lines)
    }


def test_scripts_find_the_modules_of_the_checkout():
    """Python puts a script's own folder on the import path; only `moreh` is installed."""
    scripts = [path for folder in ("benchmarks", "scripts") for path in (ROOT / folder).rglob("*.py")]
    sources = {path.relative_to(ROOT).as_posix(): path.read_text() for path in scripts}
    lost = {path: without_import_path(source) for path, source in sources.items() if "__main__" in source}
    assert len(lost) > 10
    assert not any(lost.values()), f"imported before sys.path has the checkout: {lost}"


def test_import_without_a_path_is_seen():
    assert without_import_path("import sys\nfrom utils.cli import exit_code_of\nsys.path.insert(0, 'a')") == {
        "utils.cli"
    }
    assert not without_import_path("import sys\nsys.path.insert(0, 'a')\nfrom utils.cli import exit_code_of")
