"""The command moreh-plan: the fastest plans for a model on an accelerator, with predicted step time and memory."""

import argparse
import json
import sys
from contextlib import suppress
from dataclasses import replace

from moreh.accelerator.devices import all_devices
from moreh.cli.calibration_file import read_measured_steps
from moreh.cli.plan_devices import devices_from_options
from moreh.cli.plan_options import YES_NO_AUTO, parse_options
from moreh.cli.terminal import run_tool
from moreh.errors import PlanError
from moreh.models.architecture import Architecture
from moreh.models.describe.from_source import describe
from moreh.models.describe.with_lora import ALL_LINEAR, Lora, with_lora
from moreh.planner.calibration.calibrate import Calibration, calibrate
from moreh.planner.calibration.measured_step import MeasuredStep
from moreh.planner.cost.prediction import Prediction, predict
from moreh.planner.hardware.environment import Environment
from moreh.planner.optimizer_state import FLOAT32_BYTES, optimizer_state
from moreh.planner.plan.notation import parse_plan, plan_text
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.report.comparison import compare_steps, comparison_json, comparison_sentences, comparison_table
from moreh.planner.report.explanation import explanation_json, explanation_sentences, explanation_table_forms
from moreh.planner.report.flavor_comparison import compare_flavors
from moreh.planner.report.flavor_report import flavor_table_forms, flavors_json, no_flavor_text, recommendation
from moreh.planner.report.interval import interval_json, interval_of, interval_text
from moreh.planner.report.json_output import Json, request_json, search_json, search_outcome_json
from moreh.planner.report.plan_rows import DEFAULT_COUNT, header_pairs
from moreh.planner.report.plot import check_plot_path, draw_plan
from moreh.planner.report.printing import print_pairs, print_plans, print_sentences
from moreh.planner.search.constraints import Constraints
from moreh.planner.search.request import BFLOAT16_WEIGHTS, Request
from moreh.planner.search.search import SearchOutcome, search_plans
from moreh.planner.search.suggestions import nothing_fits_text
from moreh.tables import draw_widest, terminal_width


def main() -> int:
    """Entry point of the command."""
    return run_tool(_plan)


def _plan(arguments: list[str]) -> int:
    options = parse_options(arguments)
    if options.plot is not None:
        check_plot_path(options.plot)
    request = _request(options)
    calibration, steps = None, []
    if options.calibrate is not None:
        steps = read_measured_steps(options.calibrate, request.training, request.environment)
        calibration = calibrate(steps, request.environment)
        request = replace(request, environment=calibration.applied_to(request.environment))
    max_positions = request.training.architecture.max_positions
    if max_positions is not None and options.sequence_length > max_positions:
        print(
            f"warning: {request.training.architecture.name} has {max_positions} positions: sequences of "
            f"{options.sequence_length} tokens are longer than what it was made for",
            file=sys.stderr,
        )
    width = None if options.wide else terminal_width()
    if options.flavors:
        return _compare(options, request, width)
    if options.compare is not None:
        return _compare_steps(options, request, calibration, steps, width)
    if options.explain is not None:
        return _explain(options, request, calibration, width)
    return _search(options, request, calibration, width)


def _request(options: argparse.Namespace) -> Request:
    flavor, setting = devices_from_options(options)
    if options.precision == "float8" and setting.cluster.device.float8_flops_per_second is None:
        names = ", ".join(
            device.name for device in all_devices().values() if device.float8_flops_per_second is not None
        )
        raise PlanError(
            f"{setting.cluster.device.name} does not compute in float8: "
            f"choose bfloat16, or with --device one of {names}"
        )
    return Request(
        training=Training(
            _architecture(options),
            options.batch_size,
            options.sequence_length,
            replace(
                optimizer_state(options.optimizer, {"momentum": options.momentum}),
                value_bytes=FLOAT32_BYTES if options.float32_state else None,
            ),
            own_loss=options.own_loss,
        ),
        environment=setting,
        constraints=Constraints(
            pipeline=options.stages,
            micro_batches=options.micro_batches,
            recompute=YES_NO_AUTO[options.recompute],
            shard_parameters=YES_NO_AUTO[options.shard_parameters],
            max_tensor=options.max_tensor,
            max_context=options.max_context,
            max_expert=options.max_expert,
            schedules=tuple(options.schedules),
            memory_fraction=options.memory_percent / 100,
        ),
        flavor=flavor,
        precision=options.precision if options.weights == "float32" else BFLOAT16_WEIGHTS,
    )


def _architecture(options: argparse.Namespace) -> Architecture:
    architecture = describe(options.model)
    if options.lora is None:
        return architecture
    try:
        return with_lora(architecture, Lora(options.lora, options.lora_targets or ALL_LINEAR))
    except PlanError as error:
        raise PlanError(f"--lora-targets: {error}") from None


def _search(options: argparse.Namespace, request: Request, calibration: Calibration | None, width: int | None) -> int:
    outcome = search_plans(request, options.count or DEFAULT_COUNT)
    best = outcome.result.best
    message = None if best else nothing_fits_text(request, outcome)
    if options.json:
        plot = str(options.plot) if best and options.plot else None
        plans = {**search_json(request, outcome.result), **search_outcome_json(outcome, message)}
        interval = None
        if best:
            interval = interval_json(interval_of(best[0], request.training, outcome.environment, calibration))
        _print_json({**request_json(request), **plans, "interval": interval, "plot": plot})
    elif best:
        print_plans(request, outcome.result, width, outcome.idle, calibration=calibration)
    if message:
        raise PlanError(message)
    _draw(options, request, best[0], "plan 1", width)
    return 0


def _explain(options: argparse.Namespace, request: Request, calibration: Calibration | None, width: int | None) -> int:
    outcome = search_plans(request, count=1)
    plan, setting = _plan_to_explain(options.explain, request, outcome)
    asked = predict(plan, request.training, setting)
    interval = interval_of(asked, request.training, setting, calibration)
    best = outcome.result.best[0] if outcome.result.best else None
    message = None if best else nothing_fits_text(request, outcome)
    if options.json:
        explanation = {**explanation_json(request, asked, best), **search_outcome_json(outcome, message)}
        plot = str(options.plot) if options.plot else None
        _print_json({**request_json(request), **explanation, "interval": interval_json(interval), "plot": plot})
    else:
        plans = [("This plan", plan_text(plan))] + ([] if best is None else [("Best plan", plan_text(best.plan))])
        pairs = [*header_pairs(request, outcome.result, outcome.idle), *plans]
        print_pairs([*pairs, ("80% interval", f"this plan: {interval_text(interval)}")], width)
        print(draw_widest(explanation_table_forms(asked, best), width))
        print_sentences(explanation_sentences(request, asked, best), width)
    _draw(options, request, asked, "this plan", width)
    if message:
        raise PlanError(message)
    return 0


def _plan_to_explain(text: str, request: Request, outcome: SearchOutcome) -> tuple[Plan, Environment]:
    """The plan of --explain on all devices or, if it is for fewer, on those that the search uses; and where it runs."""
    if outcome.idle:
        with suppress(PlanError):  # if it is not for the devices in use either, the error below says so
            return parse_plan(text, request.training, request.environment.cluster.devices), request.environment
    return parse_plan(text, request.training, outcome.environment.cluster.devices), outcome.environment


def _compare(options: argparse.Namespace, request: Request, width: int | None) -> int:
    rows = compare_flavors(request)
    tokens, price = options.dataset_tokens, options.price_per_device_hour
    if options.json:
        _print_json({**request_json(request), **flavors_json(request, rows, tokens, price)})
    else:
        print_pairs([pair for pair in header_pairs(request) if pair[0] != "Accelerator"], width)
        print(draw_widest(flavor_table_forms(request, rows, tokens, price), width))
    if not any(row.best for row in rows):
        raise PlanError(no_flavor_text(request, rows))
    if not options.json:
        print_sentences(recommendation(rows, tokens, price), width)
    return 0


def _compare_steps(
    options: argparse.Namespace,
    request: Request,
    calibration: Calibration | None,
    calibrated_with: list[MeasuredStep],
    width: int | None,
) -> int:
    measured = read_measured_steps(options.compare, request.training, request.environment)
    steps = compare_steps(measured, request.environment, calibration, calibrated_with)
    if options.json:
        _print_json({**request_json(request), "comparison": comparison_json(steps)})
        return 0
    print_pairs([*header_pairs(request), ("80% interval", steps[0].predicted.text)], width)
    print(draw_widest(comparison_table(steps), width))
    print_sentences(comparison_sentences(steps), width)
    return 0


def _draw(options: argparse.Namespace, request: Request, prediction: Prediction, name: str, width: int | None) -> None:
    """Draw the picture that was asked for. This comes last: everything else is printed, even if drawing fails."""
    if options.plot is None:
        return
    draw_plan(prediction, request, options.plot)
    if not options.json:
        print_sentences([f"The picture of {name} is in {options.plot}"], width)


def _print_json(content: Json) -> None:
    print(json.dumps(content, indent=1, allow_nan=False))


if __name__ == "__main__":
    sys.exit(main())
