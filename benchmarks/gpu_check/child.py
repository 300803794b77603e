"""The process of a part: `python -m gpu_check.child PART RECORDS CASE...` runs cases and writes a record of each.

A record is a line of JSON in the file RECORDS. A case has one when it starts and one when it has ended, so that the
parent knows which case has ended this process.
"""

import gc
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from gpu_check.settings import Result, Skipped, read_settings

# Of several workers, only the first one writes. The line removes the variable later on.
IS_FIRST_WORKER = os.environ.get("RANK", "0") == "0"
# The exit code after an error of the device: no later case of the same process can be trusted.
POISONED = 3


def main(arguments: list[str]) -> int:
    """Run the cases; returns the exit code."""
    part, records, *cases = arguments
    # No device is simulated here, not even without a GPU.
    os.environ["MOREH_CUDA_FACE"] = "0"
    run = importlib.import_module(f"gpu_check.parts.{part}").run
    settings = read_settings()
    for case in cases:
        _write(Path(records), {"case": case, "status": "started"})
        start = time.perf_counter()
        poisoned = False
        try:
            result: Result = run(case, settings)
            outcome = {
                "status": "passed" if result.passed else "failed",
                "figures": result.figures,
                "reason": result.reason,
            }
        except Skipped as reason:
            outcome = {"status": "skipped", "reason": str(reason)}
        except Exception as error:
            traceback.print_exc()  # into the log of the part
            outcome = {"status": "failed", "reason": one_line(error)}
            poisoned = is_device_error(error)
        _write(Path(records), {"case": case, "seconds": round(time.perf_counter() - start, 2), **outcome})
        if poisoned:
            return POISONED
        _free_memory()
    return 0


def one_line(error: BaseException) -> str:
    """The message of an error, in one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def is_device_error(error: BaseException) -> bool:
    """True if an error has left the device unusable for this process, as a failed assertion in a kernel does."""
    words = str(error)
    names = [cls.__name__ for cls in type(error).__mro__]
    if "OutOfMemoryError" in names:
        return False
    return "AcceleratorError" in names or "CUDA error" in words or "HIP error" in words


def _free_memory() -> None:
    """Free the memory that the last case has left on the device."""
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _write(records: Path, record: dict[str, Any]) -> None:
    if not IS_FIRST_WORKER:
        return
    with records.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
