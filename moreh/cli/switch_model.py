"""The command moreh-switch-model: show and change the model of the current accelerator."""

import argparse
import json
import sys

from moreh.accelerator.registry import read_registry, switch_model
from moreh.accelerator.this_machine import find_model, listed_models
from moreh.cli.terminal import QuestionAborted, ask, help_formatter, print_models, run_tool, selection_question
from moreh.tables import terminal_width, wrap_line

DESCRIPTION = (
    "Show the model (number and kind of devices) of the current MoAI Accelerator, and switch to another model."
)
EPILOG = """\
Examples:
  moreh-switch-model                   list the models and ask for one
  moreh-switch-model 8xLarge.4096GB    switch without asking

Exit codes:
  0  Success.
  1  Error.
  2  Wrong command line.
"""


def main() -> int:
    """Entry point of the command."""
    return run_tool(_switch_model)


def _switch_model(arguments: list[str]) -> int:
    options = _parse(arguments)
    registry = read_registry()
    current = registry.accelerator(registry.current).flavor.name
    if options.json and options.selection is None:
        models = [
            {"number": i, "name": f.name, "devices": f.devices, "nodes": f.nodes, "memory_mib": f.memory_mib}
            for i, f in listed_models().items()
        ]
        print(json.dumps({"accelerator": registry.current, "current": current, "models": models}, indent=1))
        return 0
    if options.selection is not None:
        switched = switch_model(options.selection)
        if options.json:
            print(json.dumps({"accelerator": switched.index, "current": switched.flavor.name}, indent=1))
        else:
            _confirm(switched.flavor.name)
        return 0
    print(f"Current MoAI Accelerator: {current}\n")
    switched_any = False
    while True:
        print_models(current)
        print()
        try:
            name = ask(selection_question(), lambda entered: find_model(entered).name)
        except QuestionAborted:
            if switched_any:
                return 0
            raise
        if name is None:
            return 0
        switched_any = True
        current = switch_model(name).flavor.name
        _confirm(current)
        print()


def _confirm(model: str) -> None:
    print(f'The MoAI Accelerator model is successfully switched to "{model}".')


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="moreh-switch-model",
        description=wrap_line(DESCRIPTION, terminal_width()),
        epilog=EPILOG,
        formatter_class=help_formatter(),
    )
    parser.add_argument(
        "selection",
        nargs="?",
        metavar="MODEL",
        help="The new model, by name or number in the list. Without it, the command asks.",
    )
    parser.add_argument(
        "-M", "--model", dest="selection_by_flag", metavar="MODEL", help="The same as MODEL, as on the MoAI Platform."
    )
    parser.add_argument(
        "--json", action="store_true", help="Print JSON: the models or, with MODEL, the result of the switch."
    )
    options = parser.parse_args(arguments)
    if options.selection is not None and options.selection_by_flag is not None:
        parser.error(f"two models, {options.selection} and {options.selection_by_flag}: give one")
    options.selection = options.selection_by_flag if options.selection is None else options.selection
    return options


if __name__ == "__main__":
    sys.exit(main())
