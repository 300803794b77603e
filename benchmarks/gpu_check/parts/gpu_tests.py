"""The tests that are marked `gpu`, where pytest is installed."""

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
from pathlib import Path

from gpu_check.settings import Result, Settings, Skipped

ROOT = Path(__file__).parents[3]
# Exit codes of pytest.
ALL_PASSED, NONE_FOUND = 0, 5


def run(case: str, settings: Settings) -> Result:
    """Run the marked tests of the file or folder `case` of tests.

    Raises:
        Skipped: pytest is not installed.
    """
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    arguments = ["-m", "gpu", "-q", "-p", "no:cacheprovider", f"tests/{case}"]
    if settings.dry:
        code, output, errors = _collect(arguments)
    else:
        command = [sys.executable, "-m", "pytest", *arguments, "-rs"]
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        code, output, errors = finished.returncode, finished.stdout, finished.stderr
    lines = [line for line in output.splitlines() if line.strip()]
    summary = re.sub(r"=+", "", lines[-1]).strip() if lines else errors[-300:]
    passed = code == ALL_PASSED
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return Result(passed, {"summary": summary}, "" if passed else "; ".join(failed)[:300] or "pytest has failed")


def _collect(arguments: list[str]) -> tuple[int, str, str]:
    """The exit code and the output of pytest in this process, a copy of one that has imported torch.

    The dry mode only collects the tests: without a GPU they skip.
    """
    import pytest

    output, errors = io.StringIO(), io.StringIO()
    os.chdir(ROOT)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = pytest.main([*arguments, "--collect-only", "--disable-warnings"])
    return int(code), output.getvalue(), errors.getvalue()
