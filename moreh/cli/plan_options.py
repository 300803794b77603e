"""The command line of moreh-plan."""

import argparse
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from moreh.accelerator.devices import all_devices
from moreh.accelerator.this_machine import THIS_MACHINE
from moreh.cli.device_options import MAX_DEVICES, add_device_options, device_option_requirements
from moreh.cli.terminal import help_formatter, positive_number, whole_number
from moreh.options import DEFAULT_MEMORY_PERCENT
from moreh.planner.optimizer_state import ADAMW, OPTIMIZER_STATES
from moreh.planner.plan.notation import LEGEND
from moreh.planner.plan.plan import SCHEDULES
from moreh.planner.report.plan_rows import DEFAULT_COUNT
from moreh.planner.report.plot import SUFFIXES
from moreh.tables import terminal_width, wrap_line

# Above any real training job, so that a typo does not keep the search busy for minutes.
MAX_ROWS, MAX_TOKENS, MAX_PLANS, MAX_RANK = 1_000_000, 100_000_000, 1_000, 1_000_000
YES_NO_AUTO = {"yes": True, "no": False, "auto": None}
# The name of each precision in SoftwareProfile.
PRECISIONS = {"bfloat16": "half", "float32": "float32", "float8": "float8"}
WEIGHTS = ("float32", "bfloat16")
DESCRIPTION = (
    "Find the fastest plans for training a model on an accelerator, with their predicted step time and memory. "
    "Needs neither the weights nor the accelerator itself."
)
EXAMPLES = """\
Examples:
  The ten fastest plans for a model on an accelerator:
    moreh-plan configs/models/llama3_70b.json --accelerator 8xLarge.4096GB \\
        --batch-size 512 --sequence-length 1024
  Why another plan is slower:
    moreh-plan configs/models/llama3_70b.json --accelerator 8xLarge.4096GB \\
        --batch-size 512 --sequence-length 1024 \\
        --explain 'tp1 pp8 dp8 mb1x64 recompute:full shard:parameters'
  Which accelerator to use for a billion tokens:
    moreh-plan configs/models/llama3_8b.json --flavors --dataset-tokens 1e9 \\
        --batch-size 64 --sequence-length 4096
  Other devices:
    moreh-plan configs/models/llama3_8b.json --device 'H100 80GB' --devices 8 \\
        --batch-size 64 --sequence-length 4096
  LoRA adapters of rank 16:
    moreh-plan configs/models/llama3_8b.json --lora 16 \\
        --batch-size 64 --sequence-length 1024
"""
EXIT_CODES = """\
Exit codes:
  0  Success.
  1  Error: an invalid request, or no plan fits.
  2  Wrong command line.
"""


def _picture(text: str) -> Path:
    if Path(text).suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text}: give a file that ends with {', '.join(SUFFIXES)}")
    return Path(text)


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line; leaves with exit code 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        prog="moreh-plan",
        usage="moreh-plan MODEL --batch-size B --sequence-length S [options]; see --help",
        description=wrap_line(DESCRIPTION, terminal_width()),
        epilog=_epilog(),
        formatter_class=help_formatter(),
    )
    parser.add_argument(
        "model", metavar="MODEL", help="The model: a config.json, a directory with one, or a name on the Hub."
    )
    parser.add_argument(
        "--batch-size",
        type=whole_number(MAX_ROWS),
        required=True,
        metavar="B",
        help="Sequences per training step, over all devices.",
    )
    parser.add_argument(
        "--sequence-length", type=whole_number(MAX_TOKENS), required=True, metavar="S", help="Tokens per sequence."
    )
    _add_training(parser.add_argument_group("training (default: all parameters, with AdamW)"))
    add_device_options(parser.add_argument_group("devices (default: the current accelerator)"))
    _add_constraints(parser.add_argument_group("constraints on the plans (default: none)"))
    _add_output(parser.add_argument_group("output (default: the best plans)"))
    options = parser.parse_args(arguments)
    needs = {
        **device_option_requirements(options),
        "--plot cannot be combined with --flavors": options.plot is None or not options.flavors,
        "--plot cannot be combined with --compare": options.plot is None or options.compare is None,
        "--lora-targets needs --lora": options.lora_targets is None or options.lora is not None,
        "--calibrate cannot be combined with --flavors": options.calibrate is None or not options.flavors,
        "--momentum needs --optimizer sgd or rmsprop": not options.momentum or options.optimizer in ("sgd", "rmsprop"),
        "--weights bfloat16 needs --precision bfloat16": options.weights == "float32"
        or options.precision == "bfloat16",
        "--float32-state needs --weights bfloat16 and --optimizer adamw": not options.float32_state
        or (options.weights == "bfloat16" and options.optimizer == ADAMW.name),
        "--dataset-tokens needs --flavors": options.dataset_tokens is None or options.flavors,
        "--price-per-device-hour needs --dataset-tokens": options.price_per_device_hour is None
        or options.dataset_tokens,
    }
    for message, is_met in needs.items():
        if not is_met:
            parser.error(message)
    return options


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--lora",
        type=whole_number(MAX_RANK),
        metavar="R",
        help="Train LoRA adapters of rank R; all other parameters are frozen.",
    )
    group.add_argument(
        "--lora-targets",
        nargs="+",
        metavar="NAME",
        help="With --lora: the matrices with adapters, such as q_proj (default: all matrices of the layers).",
    )
    group.add_argument(
        "--optimizer",
        choices=OPTIMIZER_STATES,
        default=ADAMW.name,
        metavar="NAME",
        help=f"The optimizer, one of {', '.join(OPTIMIZER_STATES)} (default {ADAMW.name}).",
    )
    group.add_argument(
        "--weights",
        choices=WEIGHTS,
        default=WEIGHTS[0],
        help="The dtype of weights, gradients and optimizer state (default float32).",
    )
    group.add_argument(
        "--float32-state", action="store_true", help="With --weights bfloat16, keep AdamW's state in float32."
    )
    group.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="Calibrate with measured steps of the training program: measured.jsonl of a run, or a file with one JSON "
        "object per line, with plan, batch_size, sequence_length, step_time_s and more (docs/planning-clusters.md).",
    )
    group.add_argument("--momentum", action="store_true", help="With --optimizer sgd or rmsprop, use momentum.")
    group.add_argument(
        "--own-loss", action="store_true", help="The script computes its loss from the logits, as in distillation."
    )


def _add_constraints(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--stages", type=whole_number(MAX_DEVICES), metavar="N", help="Use exactly N pipeline ranks.")
    group.add_argument(
        "--micro-batches", type=whole_number(MAX_ROWS), metavar="N", help="Cut each step into exactly N micro-batches."
    )
    group.add_argument(
        "--recompute",
        choices=YES_NO_AUTO,
        default="auto",
        help="Recompute activations in the backward pass: yes, no, or auto (the default), which tries both.",
    )
    group.add_argument(
        "--shard-parameters",
        choices=YES_NO_AUTO,
        default="auto",
        help="Shard parameters over data-parallel ranks: yes, no, or auto (the default), which tries both.",
    )
    group.add_argument(
        "--max-tensor", type=whole_number(MAX_DEVICES), metavar="N", help="Use at most N tensor-parallel ranks."
    )
    group.add_argument(
        "--schedules",
        nargs="+",
        choices=SCHEDULES,
        default=SCHEDULES,
        metavar="NAME",
        help=f"Use only these pipeline schedules (default: {', '.join(SCHEDULES)}).",
    )
    group.add_argument(
        "--max-context",
        type=whole_number(MAX_DEVICES),
        default=1,
        metavar="N",
        help="Use at most N context-parallel ranks (default 1: the local runtime has no context parallelism).",
    )
    group.add_argument(
        "--max-expert",
        type=whole_number(MAX_DEVICES),
        default=1,
        metavar="N",
        help="Use at most N expert-parallel ranks (default 1: the local runtime has no expert parallelism).",
    )
    group.add_argument(
        "--memory-percent",
        type=positive_number(100),
        default=float(DEFAULT_MEMORY_PERCENT),
        metavar="P",
        help=f"Let plans use P percent of each device's memory (default {DEFAULT_MEMORY_PERCENT}).",
    )
    group.add_argument(
        "--precision", choices=PRECISIONS, default="bfloat16", help="The precision of matmuls (default bfloat16)."
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    kind = group.add_mutually_exclusive_group()
    kind.add_argument(
        "--count", type=whole_number(MAX_PLANS), metavar="N", help=f"Print the N best plans (default {DEFAULT_COUNT})."
    )
    kind.add_argument(
        "--explain",
        metavar="PLAN",
        help="Compare a plan such as 'tp4 pp8 dp2 mb1x64' with the best one: why it is slower or does not fit.",
    )
    kind.add_argument(
        "--compare",
        type=Path,
        metavar="FILE",
        help="Compare predicted and measured steps of a file, in the format of --calibrate, and rank them.",
    )
    kind.add_argument(
        "--flavors", action="store_true", help="Compare the best plans of all accelerators of moreh-switch-model."
    )
    group.add_argument(
        "--dataset-tokens",
        type=positive_number(1e18),
        metavar="N",
        help="With --flavors: add the hours and device-hours for training on N tokens.",
    )
    group.add_argument(
        "--price-per-device-hour",
        type=positive_number(1e9),
        metavar="X",
        help="With --dataset-tokens: add the cost, in the currency of X.",
    )
    group.add_argument(
        "--plot",
        type=_picture,
        metavar="FILE",
        help="Draw the pipeline's timeline and the memory of its ranks, as .png, .svg or .pdf.",
    )
    group.add_argument(
        "--wide",
        action="store_true",
        help="Print all columns without line breaks. By default, the output fits the terminal (COLUMNS, or 100 columns "
        "in a file or pipe).",
    )
    group.add_argument("--json", action="store_true", help="Print all predictions as JSON.")


def _epilog() -> str:
    """The end of the text of --help, in lines that fit the terminal."""
    width = terminal_width()
    # A name is not to be broken at its space.
    names = ", ".join([*all_devices(), THIS_MACHINE]).replace(" ", "_").replace(",_", ", ")
    devices = wrap_line(f"  {names}", width, indent=2).replace("_", " ")
    notation = "\n".join(wrap_line(line, width, _text_column(line)) for line in _paragraphs(LEGEND))
    return "\n".join([notation, "", "Devices:", devices, "", EXAMPLES, EXIT_CODES])


def _paragraphs(text: str) -> Iterator[str]:
    """The lines of a text; those that do not begin with a blank are joined to paragraphs."""
    for is_indented, group in groupby(text.splitlines(), lambda line: line.startswith(" ")):
        lines = list(group)
        yield from lines if is_indented else [" ".join(lines)]


def _text_column(line: str) -> int:
    """The column at which the description begins in a line such as "  sp    sequence parallelism"; else 0."""
    match = re.match(r"  \S.*?\s{2,}", line)
    return 0 if match is None else match.end()
