"""The tests that are marked `gpu`, where pytest is installed."""

import importlib.util
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
    # The dry mode only collects them: without a GPU they skip.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", f"tests/{case}"]
    command += ["--collect-only"] if settings.dry else ["-rs"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in finished.stdout.splitlines() if line.strip()]
    summary = re.sub(r"=+", "", lines[-1]).strip() if lines else finished.stderr[-300:]
    passed = finished.returncode == ALL_PASSED
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return Result(passed, {"summary": summary}, "" if passed else "; ".join(failed)[:300] or "pytest has failed")
