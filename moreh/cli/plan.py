"""moreh-plan: how a model would be trained on an accelerator, how long a step takes, and what fits in memory."""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

from moreh.accelerator.devices import all_devices, find_device
from moreh.accelerator.flavors import Flavor, find_flavor
from moreh.accelerator.registry import read_registry
from moreh.cli.tables import Column, draw_table
from moreh.cli.terminal import EXIT_REFUSED, run_tool
from moreh.errors import PlanError
from moreh.planner.candidates import Restrictions
from moreh.planner.cluster import cluster_of_devices, cluster_of_flavor
from moreh.planner.describe import describe
from moreh.planner.explanation import explanation_json, explanation_rows, explanation_sentences
from moreh.planner.flavor_comparison import (
    compare_flavors,
    find_plans,
    flavor_headers,
    flavor_rows,
    flavors_json,
    nothing_fits_text,
    recommendation,
)
from moreh.planner.implementation import TRANSFORMERS, TRANSFORMERS_AUTOCAST, computing_in
from moreh.planner.local_machine import NAME as THIS_MACHINE
from moreh.planner.picture import SUFFIXES, draw_plan
from moreh.planner.plan import Training
from moreh.planner.plan_text import parse_plan, plan_text
from moreh.planner.prediction import Prediction, Setting, predict, setting_of, setting_of_this_machine
from moreh.planner.report import (
    PLAN_HEADERS,
    Json,
    Request,
    header_rows,
    plan_rows,
    request_json,
    search_json,
)

# Larger than anything that is trained; a typing error must not keep the search busy for minutes.
MOST_ROWS, MOST_TOKENS, MOST_DEVICES, MOST_PLANS = 1_000_000, 100_000_000, 100_000, 1_000
DEFAULT_COUNT = 10
YES_NO_AUTO = {"yes": True, "no": False, "auto": None}
PRECISIONS = {"bfloat16": "half", "float32": "float32", "float8": "float8"}
# What is computed in without advanced parallelization, by a model of transformers on this machine.
LOCAL_IMPLEMENTATIONS = {"bfloat16": TRANSFORMERS_AUTOCAST, "float32": TRANSFORMERS}


def main() -> int:
    """Entry point of the command."""
    return run_tool(_plan)


def _plan(arguments: list[str]) -> int:
    options = _parse(arguments)
    request = _request(options)
    longest = request.training.architecture.max_positions
    if longest is not None and options.sequence_length > longest:
        print(
            f"warning: {request.training.architecture.name} has {longest} positions: sequences of {options.sequence_length} "
            "tokens are longer than what it was made for",
            file=sys.stderr,
        )
    if options.flavors:
        return _compare(options, request)
    if options.explain is not None:
        return _explain(options, request)
    return _search(options, request)


def _flavor(options: argparse.Namespace) -> Flavor | None:
    """The accelerator of the list: the one that was named, the current one, or none where devices were named."""
    if options.device is not None:
        return None
    if options.accelerator is not None:
        return find_flavor(options.accelerator)
    registry = read_registry()
    return registry.accelerator(registry.current).flavor


def _request(options: argparse.Namespace) -> Request:
    flavor = _flavor(options)
    setting = _setting(options, flavor)
    if options.precision == "float8" and setting.cluster.device.float8_flops_per_second is None:
        able = ", ".join(device.name for device in all_devices().values() if device.float8_flops_per_second is not None)
        raise PlanError(
            f"{setting.cluster.device.name} does not compute in float8: choose bfloat16, or with --device one of {able}"
        )
    return Request(
        training=Training(describe(options.model), options.batch_size, options.sequence_length),
        setting=setting,
        restrictions=Restrictions(
            pipeline=options.stages,
            micro_batches=options.micro_batches,
            recompute=YES_NO_AUTO[options.recompute],
            shard_parameters=YES_NO_AUTO[options.shard_parameters],
            max_tensor=options.max_tensor,
            max_context=options.max_context,
            memory_fraction=options.memory_percent / 100,
        ),
        flavor=flavor,
        precision=options.precision,
    )


def _setting(options: argparse.Namespace, flavor: Flavor | None) -> Setting:
    implementation = computing_in(PRECISIONS[options.precision])
    if flavor is not None:
        return setting_of(cluster_of_flavor(flavor), implementation)
    if options.device.strip().lower() == THIS_MACHINE:
        return setting_of_this_machine(options.devices, LOCAL_IMPLEMENTATIONS.get(options.precision, implementation))
    return setting_of(cluster_of_devices(find_device(options.device), options.devices), implementation)


def _search(options: argparse.Namespace, request: Request) -> int:
    result = find_plans(request, options.count or DEFAULT_COUNT)
    if not result.best:
        raise PlanError(nothing_fits_text(request, result.smallest_bytes))
    drawn = _draw(options, request, result.best[0])
    if options.json:
        _print_json({**request_json(request), **search_json(request, result), "plot": drawn})
        return 0
    _print_pairs(header_rows(request, result))
    print(_table(PLAN_HEADERS, plan_rows(request, result), left=("Plan", "Largest overhead")))
    if drawn is not None:
        print(f"The picture of plan 1 is in {drawn}")
    return 0


def _explain(options: argparse.Namespace, request: Request) -> int:
    plan = parse_plan(options.explain, request.training, request.setting.cluster.devices)
    asked = predict(plan, request.training, request.setting)
    result = find_plans(request, count=1)
    best = result.best[0] if result.best else None
    drawn = _draw(options, request, asked)
    if options.json:
        _print_json({**request_json(request), **explanation_json(request, asked, best), "plot": drawn})
    else:
        _print_pairs([*header_rows(request, result), ("This plan", plan_text(plan))])
        if best is not None:
            _print_pairs([("Best plan", plan_text(best.plan))])
        headers = ("", "This plan", "Best plan")[: 2 if best is None else 3]
        print(_table(headers, explanation_rows([asked] if best is None else [asked, best]), left=("",)))
        print("\n".join(explanation_sentences(request, asked, best)))
        if drawn is not None:
            print(f"The picture of this plan is in {drawn}")
    if best is None:
        raise PlanError(nothing_fits_text(request, result.smallest_bytes))
    return 0


def _compare(options: argparse.Namespace, request: Request) -> int:
    rows = compare_flavors(request)
    tokens, price = options.dataset_tokens, options.price_per_device_hour
    if options.json:
        _print_json({**request_json(request), **flavors_json(request, rows, tokens, price)})
    else:
        _print_pairs([pair for pair in header_rows(request) if pair[0] != "Accelerator"])
        cells = flavor_rows(request, rows, tokens, price)
        print(_table(flavor_headers(tokens, price), cells, left=("Accelerator", "Fits", "Best plan")))
        print("\n".join(recommendation(rows, tokens, price)))
    return 0 if any(row.best for row in rows) else EXIT_REFUSED


def _draw(options: argparse.Namespace, request: Request, prediction: Prediction) -> str | None:
    """Draw the picture that was asked for; its name."""
    if options.plot is None:
        return None
    draw_plan(prediction, request, options.plot)
    return str(options.plot)


def _table(headers: tuple[str, ...], rows: list[tuple[str, ...]], left: tuple[str, ...]) -> str:
    """A table in which numbers stand on the right and the columns named by `left` on the left."""
    return draw_table([Column(header, 4, "left" if header in left else "right") for header in headers], rows)


def _print_pairs(pairs: list[tuple[str, str]]) -> None:
    for name, text in pairs:
        print(f"{name:14}{text}")


def _print_json(content: Json) -> None:
    print(json.dumps(content, indent=1, allow_nan=False))


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


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="moreh-plan",
        usage="moreh-plan MODEL --batch-size B --sequence-length S [options]; moreh-plan -h lists them",
        description="Find the fastest ways to train a model on an accelerator and predict what they take.",
        epilog="Exit codes: 0 done, 1 refused or nothing fits (the message says why), 2 wrong usage.",
    )
    parser.add_argument("model", metavar="MODEL", help="a config.json, a directory with one, or the name of a model")
    parser.add_argument("--batch-size", type=_whole(MOST_ROWS), required=True, metavar="B", help="rows of a training step")
    parser.add_argument("--sequence-length", type=_whole(MOST_TOKENS), required=True, metavar="S", help="tokens of a row")
    where = parser.add_argument_group("where (otherwise the current accelerator)")
    where.add_argument("--accelerator", metavar="MODEL", help="an accelerator, by its name or number in moreh-switch-model")
    where.add_argument("--device", metavar="NAME", help="a kind of device, such as 'H100 80GB' or 'this machine'")
    where.add_argument(
        "--devices", type=_whole(MOST_DEVICES), metavar="N", help="how many of them (of this machine: worker processes)"
    )
    what = parser.add_argument_group("what is decided already (otherwise it is searched)")
    what.add_argument("--stages", type=_whole(MOST_DEVICES), metavar="N", help="devices in a pipeline")
    what.add_argument("--micro-batches", type=_whole(MOST_ROWS), metavar="N", help="micro-batches of a step")
    for name, meaning in (("--recompute", "recompute activations"), ("--shard-parameters", "shard parameters")):
        what.add_argument(name, choices=YES_NO_AUTO, default="auto", help=f"{meaning}: yes, no or auto (default)")
    what.add_argument("--max-tensor", type=_whole(MOST_DEVICES), metavar="N", help="the most tensor-parallel ranks")
    what.add_argument(
        "--max-context", type=_whole(MOST_DEVICES), default=1, metavar="N", help="the most context-parallel ranks"
    )
    what.add_argument(
        "--memory-percent", type=_amount(100), default=80.0, metavar="P", help="of a device for plans (default 80)"
    )
    what.add_argument("--precision", choices=PRECISIONS, default="bfloat16", help="of the arithmetic (default bfloat16)")
    show = parser.add_argument_group("what is shown")
    kind = show.add_mutually_exclusive_group()
    kind.add_argument(
        "--count", type=_whole(MOST_PLANS), metavar="N", help=f"so many of the best plans (default {DEFAULT_COUNT})"
    )
    kind.add_argument("--explain", metavar="PLAN", help="a plan such as 'tp4 pp8 dp2 mb1x64': why it is not the best one")
    kind.add_argument("--flavors", action="store_true", help="compare all accelerators of the list")
    show.add_argument("--dataset-tokens", type=_amount(1e18), metavar="N", help="with --flavors: hours for so many tokens")
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
        "--price-per-device-hour needs --dataset-tokens": options.price_per_device_hour is None or options.dataset_tokens,
    }
    for message, is_met in needs.items():
        if not is_met:
            parser.error(message)
    return options


if __name__ == "__main__":
    sys.exit(main())
