"""What surrounds a script: its command line, and one line instead of a traceback when the user has to act."""

import argparse
import gc
import sys
from collections.abc import Callable

from moreh.errors import MorehError
from utils.config.schema import Config
from utils.config.yaml_file import load_config
from utils.errors import Stopped, UserError
from utils.plan_only import print_plan

PLAN_ONLY = "--plan-only"
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


def plan_only_fast_path(default_config: str) -> None:
    """To be called before torch and transformers are imported: if the command line has --plan-only, print the plan and exit.

    With it a script answers in a second; `run_script` would do the same after the imports. Without it garbage collection is
    put off until `run_script`: it would look through all that is imported again and again, a quarter of the time.
    """
    if PLAN_ONLY in sys.argv:
        sys.exit(run_script(print_plan, description="Plan a training.", default_config=default_config))
    gc.disable()


def run_script(train: Callable[[Config], None], description: str, default_config: str) -> int:
    """Read the settings that the command line names and call `train` with them; returns the exit code."""
    # What has been imported stays.
    gc.freeze()
    gc.enable()
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", default=default_config, metavar="FILE", help="settings, by default %(default)s")
    parser.add_argument(PLAN_ONLY, action="store_true", help="print how the accelerator would run it, and end")
    parser.add_argument(
        "--resume", metavar="CHECKPOINT", help="go on from a checkpoint: auto, or its directory or its run's"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help="settings that replace the file's")
    arguments = parser.parse_intermixed_args()
    overrides = arguments.overrides + ([f"checkpoint.resume={arguments.resume}"] if arguments.resume else [])
    program = print_plan if arguments.plan_only else train
    return exit_code_of(lambda: program(load_config(arguments.config, overrides)), debug=arguments.debug)


def exit_code_of(program: Callable[[], None], *, debug: bool) -> int:
    """Run a program; a user's mistake becomes a line for each problem on standard error and exit code 2."""
    try:
        program()
    except (UserError, MorehError) as error:
        if debug:
            raise
        for problem in str(error).splitlines():
            print(f"error: {problem}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return EXIT_TERMINATED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0
