"""What one layer of a built model consists of: its matrices, how tensor parallelism splits them, and its attention."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from moreh.models.architecture import DecoderLayer, Linear, Split

# For modules that the tensor-parallel plan of the configuration leaves out, and families without a plan.
_COLUMN_NAMES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "c_fc",
    "fc1",
    "fc_in",
    "dense_h_to_4h",
)
_ROW_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "down_proj", "fc2", "fc_out", "dense_4h_to_h")
# Queries, keys and values in one matrix.
_FUSED_NAMES = ("query_key_value", "qkv_proj", "c_attn", "Wqkv")
_EXPERT = re.compile(r"\bexperts\.\d+\.")
# What adapters call the matrix that they wrap: PEFT makes "q_proj" into "q_proj.base_layer".
_WRAPPED = re.compile(r"\.(base_layer|base|linear)$")


@dataclass
class ParameterCount:
    """Parameters that are in no matrix, and those of them without a gradient."""

    parameters: int = 0
    tensors: int = 0
    frozen_parameters: int = 0
    frozen_tensors: int = 0

    def add(self, parameter: nn.Parameter) -> None:
        """Count one more tensor."""
        self.parameters += parameter.numel()
        self.tensors += 1
        if not parameter.requires_grad:
            self.frozen_parameters += parameter.numel()
            self.frozen_tensors += 1


def is_matrix(part: nn.Module) -> bool:
    """Whether a module is a product with one weight: torch's Linear, or the Conv1D of GPT-2, whose weight is transposed."""
    return isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"


def describe_layer(layer: nn.Module, config: Any) -> DecoderLayer:
    """The layer with its attention as in `config`, a configuration of transformers; the window is left to the caller."""
    experts = _expert_counts(config)
    linears: list[Linear] = []
    others = ParameterCount()
    # The biases that were counted with their matrix.
    counted: set[int] = set()

    def add(name: str, shape: tuple[int, int], weight: nn.Parameter, bias: nn.Parameter | None, **copies: Any) -> None:
        # A bias that is trained without its matrix (or the other way round) is no part of it.
        with_bias = bias is not None and bias.requires_grad == weight.requires_grad
        if bias is not None and with_bias:
            counted.add(id(bias))
        name = _WRAPPED.sub("", name)
        linears.append(Linear(name, *shape, "none", with_bias, frozen=not weight.requires_grad, **copies))

    for module_name, part in layer.named_modules():
        own = dict(part.named_parameters(recurse=False))
        for key, parameter in own.items():
            name = f"{module_name}.{key}" if module_name else key
            if key == "weight" and is_matrix(part):
                inputs, outputs = parameter.shape if not isinstance(part, nn.Linear) else reversed(parameter.shape)
                add(module_name, (inputs, outputs), parameter, own.get("bias"))
            elif experts and parameter.dim() == 3 and parameter.shape[0] == experts[0]:
                shape = _expert_shape(name, parameter, int(config.hidden_size))
                add(name, shape, parameter, own.get(f"{key}_bias"), copies=experts[0], active=experts[1], stacked=True)
            elif id(parameter) in counted:
                continue
            elif parameter.dim() == 2 and not isinstance(part, nn.Embedding) and not key.endswith("_bias"):
                # A router, or an adapter that is a bare parameter: [outputs, inputs].
                add(name.removesuffix(".weight"), (parameter.shape[1], parameter.shape[0]), parameter, None)
            else:
                others.add(parameter)
    linears = _with_splits(_merged_experts(linears, experts), _split_rules(config))
    heads, head_dim = int(config.num_attention_heads), _head_dim(config)
    return DecoderLayer(
        heads=heads,
        kv_heads=_kv_heads(linears, heads, head_dim, config),
        head_dim=head_dim,
        linears=tuple(linears),
        other_parameters=others.parameters,
        other_tensors=others.tensors,
        frozen_other_parameters=others.frozen_parameters,
        frozen_other_tensors=others.frozen_tensors,
    )


def _expert_shape(name: str, weight: nn.Parameter, hidden: int) -> tuple[int, int]:
    """Inputs and outputs of experts in one tensor, `[experts, outputs, inputs]` or, in some families, transposed."""
    first, second = weight.shape[1:]
    transposed = (second == hidden != first) if "down" in name else (first == hidden != second)
    return (first, second) if transposed else (second, first)


def _merged_experts(linears: Iterable[Linear], experts: tuple[int, int] | None) -> list[Linear]:
    """Experts that are modules of their own ("experts.0.up_proj", "experts.1.up_proj", ...) as copies of one matrix."""
    merged: dict[Linear, int] = {}
    for linear in linears:
        general = replace(linear, name=_EXPERT.sub("experts.*.", linear.name))
        merged[general] = merged.get(general, 0) + 1
    active = experts[1] if experts else 1
    return [
        replace(linear, copies=count, active=min(active, count)) if "experts.*." in linear.name else linear
        for linear, count in merged.items()
    ]


def _expert_counts(config: Any) -> tuple[int, int] | None:
    """How many experts there are and how many a token passes through, None without any."""
    counts: list[int] = []
    for keys in (
        ("num_local_experts", "num_experts", "n_routed_experts"),
        ("num_experts_per_tok", "moe_topk", "moe_k"),
    ):
        given = [value for key in keys if isinstance(value := getattr(config, key, None), int)]
        counts.append(given[0] if given else 1)
    return (counts[0], counts[1]) if counts[0] > 1 else None


def _split_rules(config: Any) -> Mapping[str, Split]:
    """How tensor parallelism splits the matrices, by their names in a layer, from the plan of the configuration."""
    rules: dict[str, Split] = {}
    for pattern, style in (getattr(config, "base_model_tp_plan", None) or {}).items():
        name = pattern.partition(".*.")[2]
        # "colwise_gather_output" and "packed_colwise" split the outputs too.
        rules[name] = "column" if "colwise" in style else "row" if "rowwise" in style else "none"
    return rules


def _with_splits(linears: list[Linear], rules: Mapping[str, Split]) -> list[Linear]:
    """The matrices, split by the rules, or by their names where no rule is about their module.

    By their names only where a module has both sides: what a column-split matrix divides, a row-split one puts together.
    """
    covered = {name.rpartition(".")[0] for name in rules}
    by_name = {
        linear.name: _split_by_name(linear.name) for linear in linears if linear.name.rpartition(".")[0] not in covered
    }
    sides: dict[str, set[Split]] = {}
    for name, split in by_name.items():
        sides.setdefault(name.rpartition(".")[0], set()).add(split)
    result: list[Linear] = []
    for linear in linears:
        split = rules.get(linear.name, "none")
        if linear.name in by_name and {"column", "row"} <= sides[linear.name.rpartition(".")[0]]:
            split = by_name[linear.name]
        if linear.stacked and split != "none":
            # The rule is about the sides of the tensor, which some families store transposed.
            split = "row" if "down" in linear.name else "column"
        result.append(replace(linear, split=split))
    return result


def _split_by_name(name: str) -> Split:
    last = name.rpartition(".")[2]
    return "column" if last in (*_COLUMN_NAMES, *_FUSED_NAMES) else "row" if last in _ROW_NAMES else "none"


def _head_dim(config: Any) -> int:
    # Multi-head latent attention has a qk_head_dim, and a head_dim that is its rotary part only.
    for key in ("qk_head_dim", "head_dim"):
        if isinstance(value := getattr(config, key, None), int):
            return value
    return int(config.hidden_size) // int(config.num_attention_heads)


def _kv_heads(linears: Iterable[Linear], heads: int, head_dim: int, config: Any) -> int:
    """The key-value heads that the widths of the matrices show, else those of the configuration."""
    for linear in linears:
        last = linear.name.rpartition(".")[2]
        if last == "k_proj":
            return max(1, linear.outputs // head_dim)
        if last in _FUSED_NAMES:
            return max(1, (linear.outputs // head_dim - heads) // 2)
    return int(getattr(config, "num_key_value_heads", None) or heads)
