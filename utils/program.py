"""What surrounds a script: its command line, and one line instead of a traceback when the user has to act."""

import argparse
import sys
from collections.abc import Callable

from moreh.errors import MorehError
from utils.config import Config
from utils.config_file import load_config
from utils.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def run_script(train: Callable[[Config], None], description: str, default_config: str) -> int:
    """Read the settings that the command line names and call `train` with them; returns the exit code."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", default=default_config, metavar="FILE", help="settings, by default %(default)s")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help="settings that replace the file's")
    arguments = parser.parse_args()
    return exit_code_of(lambda: train(load_config(arguments.config, arguments.overrides)), debug=arguments.debug)


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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0
