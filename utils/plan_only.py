"""What --plan-only prints: how the accelerator would run a training. It imports no torch and touches no accelerator."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from moreh.accelerator.flavors import Flavor, find_flavor
from moreh.accelerator.registry import read_registry
from moreh.cli.plan_options import DEFAULT_COUNT
from moreh.cli.tables import Column, draw_table
from moreh.errors import PlanError
from moreh.models.architecture import Architecture
from moreh.models.describe.from_source import describe, describe_config
from moreh.options import planner_variables
from moreh.planner.hardware.cluster import cluster_for_flavor
from moreh.planner.hardware.environment import make_environment
from moreh.planner.plan.plan import Training
from moreh.planner.report.report import PLAN_HEADERS, header_rows, plan_rows
from moreh.planner.search.constraints import Constraints, constraints_from_options
from moreh.planner.search.request import Request
from moreh.planner.search.search import search_on_most_devices
from moreh.planner.search.suggestions import smallest_sufficient
from moreh.planner.software_profile import moreh_software
from moreh.planner.units import gib
from utils.config.schema import Config, ModelSection, ParallelizationSection, TokenizerSection
from utils.errors import UserError

ARCHITECTURES = Path(__file__).parent.parent / "configs" / "models"
# Models of the hub whose architecture is there, so that planning for them needs no network.
ARCHITECTURE_OF = {
    "cerebras/Cerebras-GPT-13B": "cerebras_gpt_13b",
    "openai-community/gpt2": "gpt2",
    "openai-community/gpt2-medium": "gpt2_medium",
    "openai-community/gpt2-large": "gpt2_large",
    "openai-community/gpt2-xl": "gpt2_xl",
    "meta-llama/Llama-2-13b-hf": "llama2_13b",
    "meta-llama/Meta-Llama-3-8B": "llama3_8b",
    "meta-llama/Meta-Llama-3-70B": "llama3_70b",
    "meta-llama/Llama-3.1-405B": "llama3_405b",
    "mistralai/Mistral-7B-v0.1": "mistral_7b",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral_8x7b",
    "Qwen/Qwen1.5-7B": "qwen1_5_7b",
    "Qwen/Qwen2.5-7B": "qwen2_5_7b",
    "Qwen/Qwen3-8B": "qwen3_8b",
}


def print_plan(config: Config) -> None:
    """Print the best plans for a training on the accelerator of its settings, or on the current one.

    Raises:
        UserError: the model has too few positions or an unknown vocabulary, or no plan fits.
        PlanError: the model cannot be described, or no plan divides the batch under the options.
    """
    request = plan_request(config)
    outcome = search_on_most_devices(request.training, request.environment, request.constraints, DEFAULT_COUNT)
    found, idle = outcome.result, outcome.idle
    if not found.best:
        raise UserError(_nothing_fits(request, found.smallest_bytes))
    rows = header_rows(request, found)
    if idle:
        rows.append(("Idle", idle))
    if config.accelerator.advanced_parallelization is None:
        rows.append(("Not used", "accelerator.advanced_parallelization is null, so a training computes on one device"))
    for name, text in rows:
        print(f"{name:14}{text}")
    texts = (PLAN_HEADERS[1], PLAN_HEADERS[-1])
    columns = [Column(header, 4, "left" if header in texts else "right") for header in PLAN_HEADERS]
    print(draw_table(columns, plan_rows(request, found)))


def plan_request(config: Config) -> Request:
    """What is to be planned for a training: the same that the hook plans at its first batch."""
    architecture = _architecture(config.model, config.tokenizer)
    positions, length = architecture.max_positions, config.data.max_length
    if positions is not None and positions < length:
        raise UserError(
            f"data.max_length is {length}, but the model has {positions} positions: make it {positions} at most"
        )
    parallelization = config.accelerator.advanced_parallelization or ParallelizationSection()
    flavor = _flavor(config)
    return Request(
        training=Training(architecture, config.train.batch_size, length),
        environment=make_environment(
            cluster_for_flavor(flavor), moreh_software("half" if parallelization.mixed_precision else "float32")
        ),
        constraints=_restrictions(parallelization, flavor.devices),
        flavor=flavor,
        precision="bfloat16" if parallelization.mixed_precision else "float32",
    )


def _restrictions(parallelization: ParallelizationSection, devices: int) -> Constraints:
    return constraints_from_options(parallelization.options(), planner_variables(), devices)


def _flavor(config: Config) -> Flavor:
    if config.accelerator.model is not None:
        return find_flavor(str(config.accelerator.model))
    registry = read_registry()
    return registry.accelerator(registry.current).flavor


def _architecture(model: ModelSection, tokenizer: TokenizerSection) -> Architecture:
    """The architecture of a model: from its settings, from a directory, or by its name on the hub."""
    if model.architecture is not None:
        return _new_architecture(model.architecture, tokenizer)
    assert model.pretrained is not None
    name = model.pretrained
    try:
        if name in ARCHITECTURE_OF and not Path(name).is_dir():
            return replace(describe(ARCHITECTURES / f"{ARCHITECTURE_OF[name]}.json"), name=name)
        return describe(name)
    except PlanError as error:
        raise UserError(f"model.pretrained: {error}") from None


def _new_architecture(architecture: dict[str, Any], tokenizer: TokenizerSection) -> Architecture:
    if "vocab_size" not in architecture and tokenizer.pretrained is not None:
        raise UserError(
            f"model.architecture: the vocabulary is that of the tokenizer {tokenizer.pretrained!r}, which is not loaded for a "
            "plan: give model.architecture.vocab_size its number of entries, on the command line if you like"
        )
    described = describe_config({"vocab_size": tokenizer.vocabulary_size, **architecture}, "model.architecture")
    return replace(described, name=f"a new {architecture['model_type']}")


def _nothing_fits(request: Request, smallest_bytes: float) -> str:
    larger = smallest_sufficient(request)
    remedies = (
        [f"give accelerator.model={larger.flavor.name}"] if larger is not None and larger.flavor is not None else []
    )
    free = _restrictions(ParallelizationSection(), request.environment.cluster.devices)
    remedies += ["fewer options in accelerator.advanced_parallelization"] if request.constraints != free else []
    remedies.append("a smaller train.batch_size or data.max_length")
    return (
        f"no plan fits {request.accelerator}: the smallest needs {gib(smallest_bytes)} on its fullest device, and plans may "
        f"use {gib(request.limit_bytes)} of each: {', or '.join(remedies)}"
    )
