"""The command moreh-smi: show accelerators and jobs; add, remove and switch accelerators; end a job."""

import argparse
import json
import sys
import time

import psutil

from moreh.accelerator.job_status import grace_of
from moreh.accelerator.registry import ensure_registry, read_registry
from moreh.accelerator.registry_content import Job
from moreh.cli.device_commands import add_device, list_devices, remove_device, switch_device
from moreh.cli.smi_collect import AcceleratorReport, collect_reports
from moreh.cli.smi_report import as_json, draw_reports
from moreh.cli.terminal import help_formatter, positive_number, run_tool
from moreh.errors import AcceleratorError
from moreh.version import __version__

# A job that ends others, as a launcher its workers, ends a moment after them.
SECONDS_AFTER_GRACE = 10.0
MAX_SECONDS_BETWEEN = 86_400.0
# The value of a device option that was given without its argument: the tool asks for it.
ASK = ""
DEVICE_OPTIONS = ("--list", "--add", "--rm", "--switch")
EXAMPLES = """\
Examples:
  moreh-smi                        show accelerators, jobs and memory
  moreh-smi -p -l 2                show every physical device, every 2 seconds
  moreh-smi device --add 10        add an accelerator of model number 10
  moreh-smi --version --json       print what a bug report needs

"""
EXIT_CODES = """\
Exit codes:
  0  Success.
  1  Error.
  2  Wrong command line.
"""


def main() -> int:
    """Entry point of the command."""
    return run_tool(_smi)


def _smi(arguments: list[str]) -> int:
    options = _parse(arguments)
    if options.command == "device":
        _change_devices(options)
    elif options.version and options.json:
        # Imported here: the module's imports would slow down every other call.
        from moreh.cli.environment_report import environment_report

        print(json.dumps(environment_report(), indent=1))
    elif options.version:
        print(f"moreh-smi {__version__}")
    elif options.server_version:
        _answer(options, "server_version", f"no server: moreh {__version__} runs its accelerators on this machine")
    elif options.token:
        registry = ensure_registry()
        index = registry.current if options.idx is None else options.idx
        _answer(options, "token", registry.accelerator(index).token)
    elif options.reset:
        _answer(options, "result", _end_job(options.idx))
    else:
        _show(options)
    return 0


def _answer(options: argparse.Namespace, name: str, text: str) -> None:
    print(json.dumps({name: text}) if options.json else text)


def _show(options: argparse.Namespace) -> None:
    """Print the accelerators once, or again and again with -l."""
    while True:
        reports = _reports(options.idx)
        if options.json:
            print(json.dumps(as_json(reports, physical=options.physical), indent=1), flush=True)
        else:
            if options.loop is not None and sys.stdout.isatty():
                print("\033[H\033[2J", end="")  # to the top left corner, clear the screen
            print(draw_reports(reports, physical=options.physical), flush=True)
        if options.loop is None:
            return
        time.sleep(options.loop)


def _reports(index: int | None) -> list[AcceleratorReport]:
    registry = read_registry()
    if index is not None:
        registry.accelerator(index)
    return [report for report in collect_reports(registry) if index in (None, report.accelerator.index)]


def _change_devices(options: argparse.Namespace) -> None:
    if options.add is not None:
        done = add_device(options.add, ask_for_it=options.add == ASK)
    elif options.rm is not None:
        done = remove_device(options.rm, ask_for_it=options.rm == ASK)
    elif options.switch is not None:
        done = switch_device(options.switch, ask_for_it=options.switch == ASK)
    else:
        done = ""
    if done is not None:  # else the user left the question
        if done and not options.json:
            print(done)
        list_devices(as_json=options.json)


def _end_job(index: int | None) -> str:
    """End the job of an accelerator, first by SIGTERM, then by SIGKILL; returns the outcome as a sentence."""
    registry = read_registry()
    accelerator = registry.accelerator(registry.current if index is None else index)
    job = registry.job_on(accelerator.index)
    if job is None:
        return f"No job is running on accelerator {accelerator.index}: nothing was ended."
    name = f"{job.shown} on accelerator {accelerator.index}"
    try:
        process = psutil.Process(job.pid)
        if not job.is_running():  # the process id may already belong to somebody else
            return f"The {name} ended by itself."
        seconds = grace_of(job) + SECONDS_AFTER_GRACE
        process.terminate()
        if _ends_within(seconds, job):
            return f"Ended {name}."
        process.kill()
        if _ends_within(SECONDS_AFTER_GRACE, job):
            return f"Killed {name}: it did not end within {seconds:.0f} s of being asked to."
    except psutil.NoSuchProcess:
        return f"The {name} ended by itself."
    except psutil.AccessDenied:
        raise AcceleratorError(f"{name} belongs to another user and cannot be ended by you") from None
    raise AcceleratorError(f"{name} was killed but is still there: it may be waiting for a disk or a device")


def _ends_within(seconds: float, job: Job) -> bool:
    """Wait for a job's process to end. A zombie, which its parent has not waited for yet, has ended."""
    deadline = time.monotonic() + seconds
    while job.is_running():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _with_command(arguments: list[str]) -> list[str]:
    """The arguments with `device` before its options, which the platform takes without it: `moreh-smi --rm 1`."""
    first = next((i for i, text in enumerate(arguments) if text.partition("=")[0] in DEVICE_OPTIONS), None)
    if first is None or "device" in arguments:
        return arguments
    return [*arguments[:first], "device", *arguments[first:]]


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="moreh-smi",
        usage="moreh-smi [options], or moreh-smi device {--list,--add,--rm,--switch}",
        description="Show your MoAI Accelerators and the jobs that run on them.",
        epilog=EXAMPLES + EXIT_CODES,
        formatter_class=help_formatter(),
    )
    parser.add_argument("-i", "--idx", type=int, metavar="N", help="Use only the accelerator with index N.")
    parser.add_argument("-p", "--physical", action="store_true", help="Also show the physical devices and the workers.")
    parser.add_argument(
        "-t", "--token", action="store_true", help="Print the token of the current accelerator, or of accelerator -i."
    )
    parser.add_argument(
        "-r",
        "--reset",
        action="store_true",
        help="End the job on the current accelerator, or on accelerator -i, after the job has saved.",
    )
    parser.add_argument(
        "-l",
        "--loop",
        type=positive_number(MAX_SECONDS_BETWEEN, "seconds"),
        metavar="SECONDS",
        help="Repeat the output every SECONDS.",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of tables.")
    parser.add_argument(
        "-s",
        "--server-version",
        action="store_true",
        help="Print the version of the server (on the platform; here there is no server).",
    )
    parser.add_argument(
        "-v",
        "--version",
        action="store_true",
        help="Print the version; with --json, also the versions of Python and torch, the machine, the environment "
        "variables and the patches of libraries.",
    )
    _add_device_command(parser)
    options = parser.parse_args(_with_command(arguments))
    _check_combinations(parser, options)
    return options


def _add_device_command(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", prog="moreh-smi")
    device = commands.add_parser(
        "device",
        help="List, add, remove or switch accelerators (see moreh-smi device --help).",
        description="List, add, remove or switch accelerators. Without an argument, the command asks for it.",
        formatter_class=help_formatter(),
    )
    action = device.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="List the accelerators; * marks the current one.")
    action.add_argument(
        "--add",
        nargs="?",
        const=ASK,
        metavar="MODEL",
        help="Add an accelerator of this model, by name or number as in moreh-switch-model.",
    )
    action.add_argument("--rm", nargs="?", const=ASK, metavar="DEVICE", help="Remove the accelerator with this index.")
    action.add_argument(
        "--switch", nargs="?", const=ASK, metavar="DEVICE", help="Make the accelerator with this index the current one."
    )
    device.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="Print the resulting list as JSON."
    )


def _check_combinations(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program with an error if options cannot be combined."""
    actions = {
        "device": options.command == "device",
        "--token": options.token,
        "--reset": options.reset,
        "--server-version": options.server_version,
        "--version": options.version,
        "--loop": options.loop is not None,
    }
    given = [name for name, is_given in actions.items() if is_given]
    if len(given) > 1:
        parser.error(f"{' and '.join(given)} cannot be combined")
    if options.physical and given not in ([], ["--loop"]):
        parser.error(f"--physical cannot be combined with {given[0]}")
    if options.idx is not None and given in (["device"], ["--version"], ["--server-version"]):
        parser.error(f"--idx cannot be combined with {given[0]}")


if __name__ == "__main__":
    sys.exit(main())
