"""moreh-smi: show the accelerators and their jobs; add, remove and switch accelerators; end a job."""

import argparse
import json
import math
import sys
import time

import psutil

from moreh.accelerator.registry import Job, ensure_registry, read_registry
from moreh.cli.device_commands import add_device, list_devices, remove_device, switch_device
from moreh.cli.smi_report import AcceleratorReport, as_json, collect_reports, draw_reports
from moreh.cli.terminal import run_tool
from moreh.errors import AcceleratorError
from moreh.version import __version__

SECONDS_UNTIL_KILL = 10.0
MAX_SECONDS_BETWEEN = 86_400.0
# Value of a device option that was given without its argument: the tool asks for it.
ASK = ""


def main() -> int:
    """Entry point of the command."""
    return run_tool(_smi)


def _smi(arguments: list[str]) -> int:
    options = _parse(arguments)
    if options.command == "device":
        _change_devices(options)
    elif options.version:
        _answer(options, "version", f"moreh-smi {__version__}")
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
    """Print the state once, or again and again with -l."""
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
        said = add_device(options.add, ask_for_it=options.add == ASK)
    elif options.rm is not None:
        said = remove_device(options.rm, ask_for_it=options.rm == ASK)
    elif options.switch is not None:
        said = switch_device(options.switch, ask_for_it=options.switch == ASK)
    else:
        said = ""
    if said is not None:  # else the user left the question
        if said and not options.json:
            print(said)
        list_devices(as_json=options.json)


def _end_job(index: int | None) -> str:
    """End the job of an accelerator, politely and then by force; say what was done."""
    registry = read_registry()
    accelerator = registry.accelerator(registry.current if index is None else index)
    job = registry.job_on(accelerator.index)
    if job is None:
        return f"No job is running on accelerator {accelerator.index}: nothing was ended."
    name = f"job {job.id} (process {job.pid}: {job.command}) on accelerator {accelerator.index}"
    try:
        process = psutil.Process(job.pid)
        if not job.is_running():  # the process id may already belong to somebody else
            return f"The {name} ended by itself."
        process.terminate()
        if _ends_within(SECONDS_UNTIL_KILL, job):
            return f"Ended {name}."
        process.kill()
        if _ends_within(SECONDS_UNTIL_KILL, job):
            return f"Killed {name}: it did not end within {SECONDS_UNTIL_KILL:g} s of being asked to."
    except psutil.NoSuchProcess:
        return f"The {name} ended by itself."
    except psutil.AccessDenied:
        raise AcceleratorError(f"{name} belongs to another user and cannot be ended by you") from None
    raise AcceleratorError(f"{name} was killed but is still there: it may be waiting for a disk or a device")


def _ends_within(seconds: float, job: Job) -> bool:
    """Wait for a job's process to end. One that its parent has not collected yet, a zombie, has ended."""
    deadline = time.monotonic() + seconds
    while job.is_running():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_SECONDS_BETWEEN:
        raise argparse.ArgumentTypeError(f"{text}: give a number of seconds above 0, at most {MAX_SECONDS_BETWEEN:g}")
    return seconds


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="moreh-smi",
        description="Show the MoAI Accelerators of this environment and the jobs that run on them.",
        epilog="Exit codes: 0 done, 1 refused (the message says why), 2 wrong usage.",
    )
    parser.add_argument("-i", "--idx", type=int, metavar="N", help="only the accelerator with this index")
    parser.add_argument("-p", "--physical", action="store_true", help="details per physical device")
    parser.add_argument("-t", "--token", action="store_true", help="show the token of the accelerator")
    parser.add_argument("-r", "--reset", action="store_true", help="end the job that runs on the accelerator")
    parser.add_argument("-l", "--loop", type=_seconds, metavar="SECONDS", help="show again every SECONDS")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("-s", "--server-version", action="store_true", help="show the version of the server")
    parser.add_argument("-v", "--version", action="store_true", help="show the version of this tool")
    commands = parser.add_subparsers(dest="command", metavar="device")
    device = commands.add_parser(
        "device",
        help="list, add, remove or switch accelerators (moreh-smi device -h)",
        description="List, add, remove or switch accelerators. An argument that is left out is asked for.",
    )
    action = device.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="list the accelerators")
    action.add_argument("--add", nargs="?", const=ASK, metavar="MODEL", help="add one of this model (name or number)")
    action.add_argument("--rm", nargs="?", const=ASK, metavar="DEVICE", help="remove the one with this index")
    action.add_argument("--switch", nargs="?", const=ASK, metavar="DEVICE", help="make this index the current one")
    device.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the new list as JSON")
    options = parser.parse_args(arguments)
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
    return options


if __name__ == "__main__":
    sys.exit(main())
