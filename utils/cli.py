"""The command line of a training script, its exit codes, and its error messages."""

import argparse
import contextlib
import gc
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from moreh.accelerator.waiting import VARIABLE as WAIT_VARIABLE
from moreh.console.output import flush_output, say
from moreh.console.printable import printable
from moreh.errors import MorehError
from moreh.options import PLATFORM_LINES_VARIABLE
from moreh.tables import terminal_width, wrap_line
from utils.accelerator import accelerator_of
from utils.config.schema import RESUME_WITH_KEYS, Config
from utils.config.section import expand_home
from utils.config.yaml_file import load_config
from utils.environment import restored_variables
from utils.errors import (
    EXIT_FAILURE,
    EXIT_SIGNAL,
    EXIT_USER_ERROR,
    DryRunEnd,
    Stopped,
    UserError,
    system_word,
)
from utils.logging.run_log import RunLog, disable_progress_bars
from utils.machine_errors import dead_loader_text, out_of_memory_text
from utils.training.checkpoint.files import checkpoints_to_resume

if TYPE_CHECKING:
    from utils.data.records import MakePair
    from utils.data.tokenization import MakeExample

# The main function of a training script.
Main = Callable[[Config, RunLog], None]


def run_script(
    main: Main, make_pair: "MakePair", make_example: "MakeExample", *, default_config: str, description: str | None
) -> int:
    """Read the command line and its settings, and train with `main`, print the plan or rows; returns the exit code.

    A script imports torch in its `main`, so --help, --plan-only and an error in the settings answer in a second.
    """
    show_any_text()
    arguments = _parser(default_config, description).parse_intermixed_args()

    def program() -> None:
        overrides = arguments.overrides + _resume_overrides(
            arguments.resume, arguments.resume_with, is_forced=arguments.resume_force
        )
        config = load_config(expand_home(arguments.config), overrides)
        with restored_variables(PLATFORM_LINES_VARIABLE, WAIT_VARIABLE):
            os.environ.setdefault(PLATFORM_LINES_VARIABLE, str(int(config.log.platform_lines)))
            os.environ.setdefault(WAIT_VARIABLE, "0")  # who starts a run by hand wants to know that it does not start
            if arguments.plan_only:
                from utils.plan_only import print_plan

                print_plan(config)
            elif arguments.show_rows is not None:
                from utils.data.show_rows import print_rows

                if not sys.stderr.isatty():
                    disable_progress_bars()
                print_rows(config, make_pair, make_example, arguments.show_rows)
            else:
                run_main(main, config, is_dry=arguments.dry_run)

    return exit_code_of(program, debug=arguments.debug)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End the program with a message; an unknown option may be meant as a setting."""
        is_unknown = message.startswith("unrecognized arguments: --")
        super().error(message + ("; a setting is written as section.key=value, such as train.lr=1e-4" * is_unknown))


def _parser(default_config: str, description: str | None) -> argparse.ArgumentParser:
    """The options of a training script."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=default_config, metavar="FILE", help="settings (default: %(default)s)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--plan-only", action="store_true", help="print the best plans for the accelerator, and exit")
    instead.add_argument(
        "--dry-run", action="store_true", help="train three steps, estimate the duration of the run, write nothing"
    )
    instead.add_argument(
        "--show-rows", type=_positive, metavar="N", help="print N training rows with their labels marked, and exit"
    )
    parser.add_argument(
        "--resume",
        metavar="CHECKPOINT",
        help="resume a checkpoint: auto (the run's last one, if any), or the directory of a run or a checkpoint",
    )
    parser.add_argument(
        "--resume-with",
        action="append",
        default=[],
        metavar="TRAIN.KEY=VALUE",
        help="with --resume: change the learning rate, schedule, weight decay or gradient clipping",
    )
    parser.add_argument(
        "--resume-force",
        action="store_true",
        help="with --resume: resume even if data, tokenizer, model or other settings differ from the checkpoint",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "overrides", nargs="*", metavar="SECTION.KEY=VALUE", help="settings that override those in the file"
    )
    if not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
        from utils.config.markdown import settings_help

        parser.epilog = settings_help(terminal_width())
    return parser


def _resume_overrides(resume: str | None, changes: list[str], *, is_forced: bool) -> list[str]:
    """The settings that the options of resuming set.

    Raises:
        UserError: an option is empty, changes a setting that it must not, or is given without --resume.
    """
    if resume is None:
        if changes or is_forced:
            option = "--resume-with" if changes else "--resume-force"
            raise UserError(f"{option} applies only to a resumed run: add --resume auto")
        return []
    if resume.strip().lower() in {"", "~", "null", "none"}:
        raise UserError(
            f"--resume: {resume!r} is not a checkpoint: give auto, the directory of a run, or one of its "
            "checkpoints/step-<number>; leave the option out to start anew"
        )
    keys = [change.partition("=")[0] for change in changes]
    for key, change in zip(keys, changes, strict=True):
        if key not in RESUME_WITH_KEYS or "=" not in change:
            raise UserError(
                f"--resume-with: {change!r} is not allowed: write key=value with one of {', '.join(RESUME_WITH_KEYS)}"
            )
    named = [f"checkpoint.resume_with=[{', '.join(keys)}]"] if keys else []
    return [f"checkpoint.resume={resume}", *changes, *named, *(["checkpoint.resume_force=true"] if is_forced else [])]


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1")
    return int(text)


def show_any_text() -> None:
    """Let the console show a character that its encoding does not have as its code, instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # none where it is closed
            stream.reconfigure(errors="backslashreplace")


def run_main(main: Main, config: Config, *, is_dry: bool = False) -> None:
    """Call the main function of a training script, with the accelerator of the settings and the log of the run.

    Raises:
        UserError: there is no checkpoint where the settings say.
    """
    if "RANK" not in os.environ:  # before torch is imported; a restarted worker may resume another checkpoint
        checkpoints_to_resume(config.checkpoint.resume, Path(config.run.directory) / config.run.name, None)
    if "torch" not in sys.modules:
        _import_libraries()
    with RunLog(config, is_dry=is_dry) as log, accelerator_of(config):
        main(config, log)


def _import_libraries() -> None:
    """Import the libraries that `main` is about to import, without garbage collection.

    Imported objects stay, so searching them again and again would be in vain. It takes a quarter of the import time.
    """
    gc.disable()
    with _leaving_at_interrupt():
        import utils.data.dataset
        import utils.training.checkpoint.checkpoints
        import utils.training.model  # noqa: F401

    gc.freeze()
    gc.enable()


@contextlib.contextmanager
def _leaving_at_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process at once. Libraries turn a KeyboardInterrupt in their imports into other errors."""

    def leave(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            os.write(2, b"interrupted\n")
        os._exit(EXIT_SIGNAL + number)

    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_default or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def exit_code_of(program: Callable[[], None], *, debug: bool) -> int:
    """Run a program; returns its exit code. An error that the user has to correct becomes lines on standard error."""
    try:
        program()
    except (UserError, MorehError) as error:
        if debug:
            raise
        for problem in str(error).splitlines():
            say(f"error: {printable(problem)}")
        return EXIT_USER_ERROR
    except DryRunEnd as end:
        print(wrap_line(str(end), terminal_width(), indent=2))
    except Stopped as stop:
        say(str(stop))
        return stop.exit_code
    except KeyboardInterrupt:
        say("interrupted")
        return EXIT_SIGNAL + signal.SIGINT
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        return EXIT_SIGNAL + signal.SIGPIPE
    except OSError as error:  # such as a full disk
        if debug or error.errno is None:
            raise
        what = "standard output" if error.filename is None else str(error.filename)
        say(f"error: {printable(what)}: {system_word(error)}")
        return EXIT_USER_ERROR
    except (MemoryError, RuntimeError) as error:
        text = out_of_memory_text(error) or dead_loader_text(error)
        if debug or text is None:
            raise
        say(f"error: {text}")
        return EXIT_FAILURE
    finally:
        flush_output()
    return 0
