"""moreh-plan: how a model would be trained on an accelerator, how long a step takes, and what fits in memory."""

import argparse
import json
import sys
from contextlib import suppress

from moreh.accelerator.devices import all_devices, find_device
from moreh.accelerator.flavors import Flavor, find_flavor
from moreh.accelerator.registry import read_registry
from moreh.cli.plan_options import DEFAULT_COUNT, PRECISIONS, YES_NO_AUTO, parse_options
from moreh.cli.tables import Column, draw_table
from moreh.cli.terminal import run_tool
from moreh.errors import PlanError
from moreh.models.describe.from_source import describe
from moreh.planner.cost.prediction import Prediction, predict
from moreh.planner.hardware.cluster import cluster_for_devices, cluster_for_flavor
from moreh.planner.hardware.environment import Environment, make_environment, measured_environment
from moreh.planner.hardware.measured_device import THIS_MACHINE
from moreh.planner.plan.notation import parse_plan, plan_text
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.report.explanation import explanation_json, explanation_rows, explanation_sentences
from moreh.planner.report.flavor_comparison import (
    compare_flavors,
    flavor_headers,
    flavor_rows,
    flavors_json,
    no_flavor_text,
    recommendation,
)
from moreh.planner.report.plot import check_plot_path, draw_plan
from moreh.planner.report.report import (
    PLAN_HEADERS,
    Json,
    header_rows,
    plan_rows,
    request_json,
    search_json,
    search_outcome_json,
)
from moreh.planner.search.constraints import Constraints
from moreh.planner.search.request import Request
from moreh.planner.search.search import SearchOutcome, search_plans
from moreh.planner.search.suggestions import nothing_fits_text
from moreh.planner.software_profile import TRANSFORMERS, TRANSFORMERS_AUTOCAST, moreh_software

# What is computed in without advanced parallelization, by a model of transformers on this machine.
LOCAL_IMPLEMENTATIONS = {"bfloat16": TRANSFORMERS_AUTOCAST, "float32": TRANSFORMERS}


def main() -> int:
    """Entry point of the command."""
    return run_tool(_plan)


def _plan(arguments: list[str]) -> int:
    options = parse_options(arguments)
    if options.plot is not None:
        check_plot_path(options.plot)
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
        environment=setting,
        constraints=Constraints(
            pipeline=options.stages,
            micro_batches=options.micro_batches,
            recompute=YES_NO_AUTO[options.recompute],
            shard_parameters=YES_NO_AUTO[options.shard_parameters],
            max_tensor=options.max_tensor,
            max_context=options.max_context,
            schedules=tuple(options.schedules),
            memory_fraction=options.memory_percent / 100,
        ),
        flavor=flavor,
        precision=options.precision,
    )


def _setting(options: argparse.Namespace, flavor: Flavor | None) -> Environment:
    implementation = moreh_software(PRECISIONS[options.precision])
    if flavor is not None:
        return make_environment(cluster_for_flavor(flavor), implementation)
    if options.device.strip().lower() == THIS_MACHINE:
        return measured_environment(options.devices, LOCAL_IMPLEMENTATIONS.get(options.precision, implementation))
    return make_environment(cluster_for_devices(find_device(options.device), options.devices), implementation)


def _search(options: argparse.Namespace, request: Request) -> int:
    found = search_plans(request, options.count or DEFAULT_COUNT)
    best = found.result.best
    message = None if best else nothing_fits_text(request, found)
    if options.json:
        plot = str(options.plot) if best and options.plot else None
        content = {**request_json(request), **search_json(request, found.result), **search_outcome_json(found, message)}
        _print_json({**content, "plot": plot})
    elif best:
        _print_pairs(_header(request, found))
        print(_table(PLAN_HEADERS, plan_rows(request, found.result), left=(PLAN_HEADERS[1], PLAN_HEADERS[-1])))
    if message:
        raise PlanError(message)
    _draw(options, request, best[0], "plan 1")
    return 0


def _explain(options: argparse.Namespace, request: Request) -> int:
    found = search_plans(request, count=1)
    plan, setting = _given_plan(options.explain, request, found)
    asked = predict(plan, request.training, setting)
    best = found.result.best[0] if found.result.best else None
    message = None if best else nothing_fits_text(request, found)
    if options.json:
        content = {
            **request_json(request),
            **explanation_json(request, asked, best),
            **search_outcome_json(found, message),
        }
        _print_json({**content, "plot": str(options.plot) if options.plot else None})
    else:
        _print_pairs([*_header(request, found), ("This plan", plan_text(plan))])
        if best is not None:
            _print_pairs([("Best plan", plan_text(best.plan))])
        headers = ("", "This plan", "Best plan")[: 2 if best is None else 3]
        print(_table(headers, explanation_rows([asked] if best is None else [asked, best]), left=("",)))
        print("\n".join(explanation_sentences(request, asked, best)))
    _draw(options, request, asked, "this plan")
    if message:
        raise PlanError(message)
    return 0


def _given_plan(text: str, request: Request, found: SearchOutcome) -> tuple[Plan, Environment]:
    """The plan of a text, for all devices or for those that the search uses, and the setting with these."""
    if found.idle:
        with suppress(PlanError):  # what is wrong with it on the devices in use is said below
            return parse_plan(text, request.training, request.environment.cluster.devices), request.environment
    return parse_plan(text, request.training, found.environment.cluster.devices), found.environment


def _compare(options: argparse.Namespace, request: Request) -> int:
    rows = compare_flavors(request)
    tokens, price = options.dataset_tokens, options.price_per_device_hour
    if options.json:
        _print_json({**request_json(request), **flavors_json(request, rows, tokens, price)})
    else:
        _print_pairs([pair for pair in header_rows(request) if pair[0] != "Accelerator"])
        cells = flavor_rows(request, rows, tokens, price)
        print(_table(flavor_headers(tokens, price), cells, left=("Accelerator", "Fits", "Best plan")))
    if not any(row.best for row in rows):
        raise PlanError(no_flavor_text(request, rows))
    if not options.json:
        print("\n".join(recommendation(rows, tokens, price)))
    return 0


def _draw(options: argparse.Namespace, request: Request, prediction: Prediction, name: str) -> None:
    """Draw the picture that was asked for, after everything else was printed."""
    if options.plot is None:
        return
    draw_plan(prediction, request, options.plot)
    if not options.json:
        print(f"The picture of {name} is in {options.plot}")


def _header(request: Request, found: SearchOutcome) -> list[tuple[str, str]]:
    rows = header_rows(request, found.result)
    return [*rows[:-1], ("Idle", found.idle.replace(" stay idle", "", 1)), rows[-1]] if found.idle else rows


def _table(headers: tuple[str, ...], rows: list[tuple[str, ...]], left: tuple[str, ...]) -> str:
    """A table in which numbers stand on the right and the columns named by `left` on the left."""
    return draw_table([Column(header, 4, "left" if header in left else "right") for header in headers], rows)


def _print_pairs(pairs: list[tuple[str, str]]) -> None:
    for name, text in pairs:
        print(f"{name:14}{text}")


def _print_json(content: Json) -> None:
    print(json.dumps(content, indent=1, allow_nan=False))


if __name__ == "__main__":
    sys.exit(main())
