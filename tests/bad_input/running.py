"""Runs a tool in this process, as its command would."""

import contextlib
import importlib.util
import io
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import generate
import train_gpt
import utils.report.__main__ as report
from moreh.cli import plan_command, smi, switch_model
from tests.conftest import ROOT
from utils.cli import run_script
from utils.training.checkpoint.stopping import STOP_SIGNALS

TRACEBACK = "Traceback (most recent call last)"


def _train() -> int:
    make = (train_gpt.make_pair, train_gpt.make_example)
    return run_script(train_gpt.main, *make, default_config="", description=None)


def _export() -> int:
    spec = importlib.util.spec_from_file_location("export", ROOT / "scripts" / "export.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main()


TOOLS: dict[str, Callable[[], int]] = {
    "train": _train,
    "plan": plan_command.main,
    "smi": smi.main,
    "switch": switch_model.main,
    "generate": generate.main,
    "export": _export,
    "report": report.main,
}


class _Input(io.TextIOWrapper):
    def isatty(self) -> bool:
        return False


def run_tool(tool: str, arguments: list[str], settings: Path, input: str = "") -> tuple[object, str]:
    """The exit code of a tool and what it writes to standard error. An error that ends it is written there too."""
    given = ["--config", str(settings)] if tool == "train" and "--config" not in arguments else []
    before, errors = (sys.argv, sys.stdin), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}  # a training sets its own
    sys.argv, sys.stdin = [tool, *given, *arguments], _Input(io.BytesIO(input.encode()))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            try:
                code: object = TOOLS[tool]()
            except SystemExit as end:
                code = end.code
            except BaseException:
                code = TRACEBACK
                traceback.print_exc(file=errors)
    finally:
        sys.argv, sys.stdin = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, errors.getvalue()
