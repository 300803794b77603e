"""The command line of moreh-plan."""

import argparse
import math
import textwrap
from collections.abc import Callable
from pathlib import Path

from moreh.accelerator.devices import all_devices
from moreh.planner.hardware.measured_device import THIS_MACHINE
from moreh.planner.plan.notation import LEGEND
from moreh.planner.plan.plan import SCHEDULES
from moreh.planner.report.plot import SUFFIXES

# Larger than anything that is trained; a typing error must not keep the search busy for minutes.
MAX_ROWS, MAX_TOKENS, MAX_DEVICES, MAX_PLANS = 1_000_000, 100_000_000, 100_000, 1_000
DEFAULT_COUNT = 10
YES_NO_AUTO = {"yes": True, "no": False, "auto": None}
PRECISIONS = {"bfloat16": "half", "float32": "float32", "float8": "float8"}
EXAMPLES = """\
Examples:
  moreh-plan configs/models/llama3_8b.json --batch-size 64 --sequence-length 4096 --flavors
  moreh-plan configs/models/llama3_70b.json --accelerator 8xLarge.4096GB --batch-size 512 \\
      --sequence-length 1024 --explain 'tp1 pp8 dp8 mb1x64 recompute:full shard:parameters'
"""
EXIT_CODES = "Exit codes: 0 done, 1 refused or nothing fits (the message says why), 2 wrong usage."


def _whole(most: int) -> Callable[[str], int]:
    """The type of an option: a whole number from 1 to `most`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or len(text) > 12 or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1 to {most:,}")
        return int(text)

    return parse


def _amount(most: float) -> Callable[[str], float]:
    """The type of an option: a number above 0, at most `most`."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 < number <= most:
            raise argparse.ArgumentTypeError(f"{text}: give a number above 0, at most {most:g}")
        return number

    return parse


def _picture(text: str) -> Path:
    if Path(text).suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text}: give a file that ends with {', '.join(SUFFIXES)}")
    return Path(text)


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line; leaves with exit code 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        prog="moreh-plan",
        usage="moreh-plan MODEL --batch-size B --sequence-length S [options]; moreh-plan -h lists them",
        description="Find the fastest ways to train a model on an accelerator and predict what they take.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a config.json, a directory with one, or the name of a model")
    parser.add_argument(
        "--batch-size", type=_whole(MAX_ROWS), required=True, metavar="B", help="rows of a training step"
    )
    parser.add_argument(
        "--sequence-length", type=_whole(MAX_TOKENS), required=True, metavar="S", help="tokens of a row"
    )
    where = parser.add_argument_group("where (otherwise the current accelerator)")
    where.add_argument(
        "--accelerator", metavar="MODEL", help="an accelerator, by its name or number in moreh-switch-model"
    )
    where.add_argument("--device", metavar="NAME", help="a kind of device, one of those below")
    where.add_argument(
        "--devices", type=_whole(MAX_DEVICES), metavar="N", help="how many of them (of this machine: worker processes)"
    )
    what = parser.add_argument_group("what is decided already (otherwise it is searched)")
    what.add_argument("--stages", type=_whole(MAX_DEVICES), metavar="N", help="devices in a pipeline")
    what.add_argument("--micro-batches", type=_whole(MAX_ROWS), metavar="N", help="micro-batches of a step")
    for name, meaning in (("--recompute", "recompute activations"), ("--shard-parameters", "shard parameters")):
        what.add_argument(name, choices=YES_NO_AUTO, default="auto", help=f"{meaning}: yes, no or auto (default)")
    what.add_argument("--max-tensor", type=_whole(MAX_DEVICES), metavar="N", help="the most tensor-parallel ranks")
    what.add_argument(
        "--schedules",
        nargs="+",
        choices=SCHEDULES,
        default=SCHEDULES,
        metavar="NAME",
        help=f"only these pipeline schedules: {', '.join(SCHEDULES)}",
    )
    what.add_argument(
        "--max-context",
        type=_whole(MAX_DEVICES),
        default=1,
        metavar="N",
        help="the most context-parallel ranks (default 1: the local runtime has no context parallelism)",
    )
    what.add_argument(
        "--memory-percent", type=_amount(100), default=80.0, metavar="P", help="of a device for plans (default 80)"
    )
    what.add_argument(
        "--precision", choices=PRECISIONS, default="bfloat16", help="of the arithmetic (default bfloat16)"
    )
    show = parser.add_argument_group("what is shown")
    kind = show.add_mutually_exclusive_group()
    kind.add_argument(
        "--count", type=_whole(MAX_PLANS), metavar="N", help=f"so many of the best plans (default {DEFAULT_COUNT})"
    )
    kind.add_argument(
        "--explain", metavar="PLAN", help="a plan such as 'tp4 pp8 dp2 mb1x64': why it is not the best one"
    )
    kind.add_argument("--flavors", action="store_true", help="compare all accelerators of moreh-switch-model")
    show.add_argument(
        "--dataset-tokens", type=_amount(1e18), metavar="N", help="with --flavors: hours for so many tokens"
    )
    show.add_argument(
        "--price-per-device-hour", type=_amount(1e9), metavar="X", help="with --dataset-tokens: cost, in your unit"
    )
    show.add_argument(
        "--plot", type=_picture, metavar="FILE", help="draw the pipeline's timeline and the memory (.png, .svg, .pdf)"
    )
    show.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    needs = {
        "--device and --devices are given together": (options.device is None) == (options.devices is None),
        "--device cannot be combined with --accelerator": options.device is None or options.accelerator is None,
        "--device cannot be combined with --flavors": options.device is None or not options.flavors,
        "--plot cannot be combined with --flavors": options.plot is None or not options.flavors,
        "--dataset-tokens needs --flavors": options.dataset_tokens is None or options.flavors,
        "--price-per-device-hour needs --dataset-tokens": options.price_per_device_hour is None
        or options.dataset_tokens,
    }
    for message, is_met in needs.items():
        if not is_met:
            parser.error(message)
    return options


def _epilog() -> str:
    # A name is not to be broken at its space.
    names = ", ".join([*all_devices(), THIS_MACHINE]).replace(" ", "_").replace(",_", ", ")
    devices = textwrap.fill(f"Devices: {names}", width=100, subsequent_indent="  ").replace("_", " ")
    return "\n".join([LEGEND, devices, "", EXAMPLES, EXIT_CODES])
