"""Prints the best plans of a run, for --plan-only, without importing torch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from moreh.accelerator.flavors import Flavor
from moreh.accelerator.registry import read_registry
from moreh.accelerator.this_machine import find_model
from moreh.errors import PlanError
from moreh.models.architecture import Architecture
from moreh.models.describe.from_source import describe, describe_config
from moreh.models.describe.with_lora import Lora, with_lora
from moreh.options import planner_variables
from moreh.planner.hardware.cluster import cluster_for_flavor
from moreh.planner.hardware.environment import make_environment
from moreh.planner.optimizer_state import FLOAT32_BYTES, OptimizerState, optimizer_state
from moreh.planner.plan.plan import Training
from moreh.planner.report.plan_rows import DEFAULT_COUNT
from moreh.planner.report.printing import print_plans
from moreh.planner.search.attainable import attainable, lowered_options
from moreh.planner.search.constraints import Constraints, constraints_from_options
from moreh.planner.search.request import BFLOAT16_WEIGHTS, Request
from moreh.planner.search.search import search_on_most_devices
from moreh.planner.search.suggestions import smallest_sufficient
from moreh.planner.software_profile import moreh_software
from moreh.planner.units import gib
from moreh.tables import terminal_width
from utils.config.architecture_keys import with_tokenizer_keys
from utils.config.hook_section import ParallelizationSection
from utils.config.schema import Config, ModelSection, TokenizerSection
from utils.errors import UserError

ARCHITECTURES = Path(__file__).parent.parent / "configs" / "models"
# Models of the hub whose architecture is in that directory, so that planning for them needs no network.
ARCHITECTURE_FILES = {
    "cerebras/Cerebras-GPT-111M": "cerebras_gpt_111m",
    "cerebras/Cerebras-GPT-256M": "cerebras_gpt_256m",
    "cerebras/Cerebras-GPT-590M": "cerebras_gpt_590m",
    "cerebras/Cerebras-GPT-1.3B": "cerebras_gpt_1_3b",
    "cerebras/Cerebras-GPT-2.7B": "cerebras_gpt_2_7b",
    "cerebras/Cerebras-GPT-6.7B": "cerebras_gpt_6_7b",
    "cerebras/Cerebras-GPT-13B": "cerebras_gpt_13b",
    "google/gemma-3-1b-it": "gemma3_1b",
    "google/gemma-3-1b-pt": "gemma3_1b",
    "openai-community/gpt2": "gpt2",
    "openai-community/gpt2-medium": "gpt2_medium",
    "openai-community/gpt2-large": "gpt2_large",
    "openai-community/gpt2-xl": "gpt2_xl",
    "meta-llama/Llama-2-13b-hf": "llama2_13b",
    "meta-llama/Meta-Llama-3-8B": "llama3_8b",
    "meta-llama/Meta-Llama-3-70B": "llama3_70b",
    "meta-llama/Llama-3.1-8B": "llama3_1_8b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama3_1_8b",
    "meta-llama/Llama-3.1-70B": "llama3_1_70b",
    "meta-llama/Llama-3.1-70B-Instruct": "llama3_1_70b",
    "meta-llama/Llama-3.1-405B": "llama3_405b",
    "meta-llama/Llama-3.2-1B": "llama3_2_1b",
    "meta-llama/Llama-3.2-1B-Instruct": "llama3_2_1b",
    "mistralai/Mistral-7B-v0.1": "mistral_7b",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistral_7b_v0_3",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral_8x7b",
    "Qwen/Qwen1.5-7B": "qwen1_5_7b",
    "Qwen/Qwen2.5-7B": "qwen2_5_7b",
    "Qwen/Qwen3-0.6B": "qwen3_0_6b",
    "Qwen/Qwen3-8B": "qwen3_8b",
    "Qwen/Qwen3-30B-A3B": "qwen3_30b_a3b",
    "Qwen/Qwen3-Next-80B-A3B-Instruct": "qwen3_next_80b_a3b",
    "deepseek-ai/DeepSeek-V3": "deepseek_v3",
    "openai/gpt-oss-20b": "gpt_oss_20b",
}


def print_plan(config: Config) -> None:
    """Print the best plans for a run on the accelerator of its settings, or on the current one.

    Raises:
        UserError: the model has too few positions or an unknown vocabulary, or no plan fits.
        PlanError: the model cannot be described, or no plan can divide the batch under the options.
    """
    asked = plan_request(config)
    request = attainable(asked)
    outcome = search_on_most_devices(request.training, request.environment, request.constraints, DEFAULT_COUNT)
    if not outcome.result.best:
        raise UserError(_no_plan_text(request, outcome.result.smallest_bytes))
    notes = [("Lowered", text) for text in lowered_options(asked.constraints, request.constraints)]
    if config.accelerator.advanced_parallelization is None:
        notes.append(("Not used", "accelerator.advanced_parallelization is null, so a training computes on one device"))
    print_plans(request, outcome.result, terminal_width(), outcome.idle, notes)


def plan_request(config: Config) -> Request:
    """The request to the planner for a run, as the hook makes it at the first batch."""
    architecture = _trained_architecture(config)
    max_positions, max_length = architecture.max_positions, config.data.max_length
    if max_positions is not None and max_positions < max_length:
        raise UserError(
            f"data.max_length is {max_length}, but the model has {max_positions} positions: "
            f"give at most {max_positions}"
        )
    parallelization = config.accelerator.advanced_parallelization or ParallelizationSection()
    flavor = _flavor(config)
    precision = "bfloat16" if parallelization.mixed_precision else "float32"
    has_half_weights = config.model.dtype == "bfloat16"
    software = moreh_software("half" if parallelization.mixed_precision else "float32", half_weights=has_half_weights)
    return Request(
        training=Training(
            architecture,
            config.train.batch_size,
            max_length,
            _optimizer_state(config),
        ),
        environment=make_environment(cluster_for_flavor(flavor), software),
        constraints=_constraints(parallelization, flavor.devices),
        flavor=flavor,
        precision=BFLOAT16_WEIGHTS if has_half_weights else precision,
    )


def _optimizer_state(config: Config) -> OptimizerState:
    state = optimizer_state(config.train.optimizer, config.train.optimizer_settings)
    has_own_type = config.model.dtype == "bfloat16" and config.train.optimizer_state_dtype == "float32"
    return replace(state, value_bytes=FLOAT32_BYTES) if has_own_type else state


def _constraints(parallelization: ParallelizationSection, devices: int) -> Constraints:
    return constraints_from_options(parallelization.parallel_options(), planner_variables(), devices)


def _flavor(config: Config) -> Flavor:
    if config.accelerator.model is not None:
        flavor = find_model(str(config.accelerator.model))
    else:
        registry = read_registry()
        flavor = registry.accelerator(registry.current).flavor
    if flavor.simulated or config.accelerator.workers is None:
        return flavor
    return flavor.with_devices(config.accelerator.workers, flavor.devices)  # each worker has a GPU


def _trained_architecture(config: Config) -> Architecture:
    """The architecture of the model of a run, with its adapters if it has some."""
    architecture, lora = _architecture(config.model, config.tokenizer), config.model.lora
    if lora is None:
        return architecture
    try:
        return with_lora(architecture, Lora(lora.r, lora.targets, dropout=lora.dropout > 0))
    except PlanError as error:
        raise UserError(f"model.lora.targets: {error}") from None


def _architecture(model: ModelSection, tokenizer: TokenizerSection) -> Architecture:
    """The architecture of a model: from the settings, from a directory, or by its name on the hub."""
    if model.architecture is not None:
        return _new_architecture(model.architecture, tokenizer)
    assert model.pretrained is not None
    name = model.pretrained
    try:
        if name in ARCHITECTURE_FILES and not Path(name).is_dir():
            return replace(describe(ARCHITECTURES / f"{ARCHITECTURE_FILES[name]}.json"), name=name)
        return describe(name)
    except PlanError as error:
        raise UserError(f"model.pretrained: {error}") from None


def _new_architecture(architecture: dict[str, Any], tokenizer: TokenizerSection) -> Architecture:
    text_config = architecture.get("text_config")
    has_size = "vocab_size" in (text_config if isinstance(text_config, dict) else architecture)
    if not has_size and tokenizer.pretrained is not None:
        raise UserError(
            f"model.architecture: the vocabulary is that of the tokenizer {tokenizer.pretrained!r}, which a plan does "
            "not load: give model.architecture.vocab_size its number of entries, in the file or on the command line"
        )
    keys = with_tokenizer_keys(architecture, {"vocab_size": tokenizer.entries_to_train()})
    described = describe_config(keys, "model.architecture")
    return replace(described, name=f"a new {architecture['model_type']}")


def _no_plan_text(request: Request, smallest_bytes: float) -> str:
    """The error if no plan fits: the memory of the smallest plan, and remedies."""
    larger = smallest_sufficient(request)
    remedies = (
        [f"give accelerator.model={larger.flavor.name}"] if larger is not None and larger.flavor is not None else []
    )
    unconstrained = _constraints(ParallelizationSection(), request.environment.cluster.devices)
    if request.constraints != unconstrained:
        remedies.append("fewer options in accelerator.advanced_parallelization")
    remedies.append("a smaller train.batch_size or data.max_length")
    return (
        f"no plan fits {request.accelerator}: the smallest needs {gib(smallest_bytes)} on its fullest device, "
        f"and plans may use {gib(request.limit_bytes)} of each: {', or '.join(remedies)}"
    )
