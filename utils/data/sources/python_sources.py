"""Finds and parses the Python sources of installed packages, without importing them."""

import ast
import importlib.util
import sysconfig
import warnings
from pathlib import Path

from utils.errors import UserError

STANDARD_LIBRARY = "stdlib"
_EXCLUDED_DIRECTORIES = {
    "test",
    "tests",
    "testing",
    "idle_test",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
}


def source_files(packages: list[str], key: str) -> list[Path]:
    """The Python files of some packages without their tests; `key` is the setting that names the packages.

    Raises:
        UserError: a package is not installed.
    """
    files = []
    for package in packages:
        directory = _source_directory(package, key)
        files += [
            path
            for path in sorted(directory.rglob("*.py"))
            if _EXCLUDED_DIRECTORIES.isdisjoint(path.relative_to(directory).parts)
        ]
    return files


def _source_directory(package: str, key: str) -> Path:
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib"))
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{key}: there is no installed package {package!r}: give names of packages (not of modules), or "
            f"{STANDARD_LIBRARY!r} for Python's own library"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def parse_source(path: Path) -> tuple[str, ast.Module] | None:
    """The text and the syntax tree of a file; None where it cannot be read or is not Python."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences in other people's sources
            return source, ast.parse(source)
    except (SyntaxError, ValueError, OSError):
        return None
