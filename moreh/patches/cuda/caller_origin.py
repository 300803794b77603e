"""Distinguishes calls from user code and from libraries, which must not enter CUDA paths of a CPU build."""

import sys
import sysconfig
from functools import cache
from pathlib import Path

import torch

_LIBRARY_DIRECTORIES = tuple(
    f"{Path(sysconfig.get_path(name)).resolve()}/" for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
_PACKAGE_DIRECTORIES = ("/site-packages/", "/dist-packages/")
_MOREH = f"{Path(__file__).resolve().parents[2]}/"
_TORCH = f"{Path(torch.__file__).resolve().parent}/"


def caller_is_user_code(frames_up: int) -> bool:
    """True if the code `frames_up` frames above the caller of this function is a user's.

    User code is neither in the standard library nor in a directory of installed packages. Cells of a notebook and input
    at a prompt are user code.
    """
    return is_user_file(sys._getframe(frames_up + 1).f_code.co_filename)


def caller_is_torch_or_moreh(frames_up: int) -> bool:
    """True if the code `frames_up` frames above the caller of this function is torch's or moreh's."""
    return _is_torch_or_moreh(sys._getframe(frames_up + 1).f_code.co_filename)


def caller_asks_for_bfloat16(frames_up: int) -> bool:
    """True if that code is transformers' check whether a script may request bfloat16.

    The check leads into no CUDA code: `TrainingArguments(bf16=True)` is autocast on any device.
    """
    frame = sys._getframe(frames_up + 1)
    module, function = frame.f_globals.get("__name__"), frame.f_code.co_name
    return (module, function) == ("transformers.utils.import_utils", "is_torch_bf16_gpu_available")


@cache
def is_user_file(file_name: str) -> bool:
    """True if a file is the user's: see `caller_is_user_code`."""
    if file_name.startswith("<frozen"):
        return False
    if file_name.startswith("<"):  # <stdin>, <string>, <ipython-input-...>
        return True
    path = str(Path(file_name).resolve())
    return not path.startswith((*_LIBRARY_DIRECTORIES, _MOREH)) and not any(
        part in path for part in _PACKAGE_DIRECTORIES
    )


@cache
def _is_torch_or_moreh(file_name: str) -> bool:
    return not file_name.startswith("<") and str(Path(file_name).resolve()).startswith((_TORCH, _MOREH))
