"""Regenerates the report of a run from its files: python -m utils.report runs/NAME."""

import argparse
import sys
from pathlib import Path

from utils.errors import UserError
from utils.report.live import write_report


def main() -> int:
    """Write the report; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m utils.report", description=__doc__)
    parser.add_argument("directory", type=Path, help="the directory of the run")
    directory = parser.parse_args().directory
    try:
        print(f"Report: {write_report(_run_directory(directory))}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {directory}: the report cannot be written: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


def _run_directory(directory: Path) -> Path:
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory}: there is no config.yaml: give the directory of a run, such as runs/gpt")
    return directory.resolve()


if __name__ == "__main__":
    sys.exit(main())
