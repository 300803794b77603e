"""One layer of a built model: its matrices, how tensor parallelism splits them, and its attention."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from moreh.models.architecture import DecoderLayer, Linear, Split
from moreh.models.families import FAMILIES
from moreh.models.families.tp_blocks import TPBlock
from moreh.models.introspection import is_matrix

# The index of an expert in the name of a module.
_EXPERT = re.compile(r"\bexperts\.\d+\.")
# What adapters call the matrix that they wrap: PEFT makes "q_proj" into "q_proj.base_layer".
_WRAPPED_SUFFIX = re.compile(r"\.(base_layer|base|linear)$")


@dataclass
class ParameterCount:
    """A sum over parameter tensors."""

    parameters: int = 0
    """Elements of all tensors."""
    tensors: int = 0
    """The number of tensors."""
    frozen_parameters: int = 0
    """Elements of the frozen tensors."""
    frozen_tensors: int = 0
    """The number of frozen tensors."""

    def add(self, parameter: nn.Parameter) -> None:
        """Count a tensor."""
        self.parameters += parameter.numel()
        self.tensors += 1
        if not parameter.requires_grad:
            self.frozen_parameters += parameter.numel()
            self.frozen_tensors += 1


def describe_layer(layer: nn.Module, config: Any, layer_type: str = "") -> DecoderLayer:
    """The layer, with attention as in `config` of transformers. The caller fills in its window.

    `layer_type` is its entry in `config.layer_types`.
    """
    experts = _expert_counts(config)
    linears: list[Linear] = []
    others = ParameterCount()
    # The ids of the biases that are counted with their matrix.
    counted_biases: set[int] = set()
    dropped = _matrices_after_dropout(layer)

    def add(name: str, shape: tuple[int, int], weight: nn.Parameter, bias: nn.Parameter | None, **fields: Any) -> None:
        # A bias that is trained while the weight is frozen, or frozen while it is trained, is counted separately.
        with_bias = bias is not None and bias.requires_grad == weight.requires_grad
        if bias is not None and with_bias:
            counted_biases.add(id(bias))
        name = _WRAPPED_SUFFIX.sub("", name)
        linears.append(Linear(name, *shape, "none", with_bias, frozen=not weight.requires_grad, **fields))

    for module_name, part in layer.named_modules():
        own = dict(part.named_parameters(recurse=False))
        for key, parameter in own.items():
            name = f"{module_name}.{key}" if module_name else key
            if key == "weight" and is_matrix(part):
                inputs, outputs = parameter.shape if not isinstance(part, nn.Linear) else reversed(parameter.shape)
                add(module_name, (inputs, outputs), parameter, own.get("bias"), dropped_input=id(part) in dropped)
            elif experts and parameter.dim() == 3 and parameter.shape[0] == experts[0]:
                shape = _expert_shape(name, parameter, int(config.hidden_size))
                add(name, shape, parameter, own.get(f"{key}_bias"), copies=experts[0], active=experts[1], stacked=True)
            elif id(parameter) in counted_biases:
                continue
            elif parameter.dim() == 2 and not isinstance(part, nn.Embedding) and not key.endswith("_bias"):
                # A router, or an adapter that is a bare parameter: [outputs, inputs].
                add(name.removesuffix(".weight"), (parameter.shape[1], parameter.shape[0]), parameter, None, bare=True)
            else:
                others.add(parameter)
    linears = _with_splits(_merge_experts(linears, experts), _declared_splits(config))
    heads, head_dim, state = int(config.num_attention_heads), _head_dim(config), 0
    kv_heads = _kv_heads(linears, heads, head_dim, config)
    if layer_type == "linear_attention":
        heads, kv_heads, head_dim, state = _linear_attention(config)
    return DecoderLayer(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        linears=tuple(linears),
        state_elements=state,
        other_parameters=others.parameters,
        other_tensors=others.tensors,
        frozen_other_parameters=others.frozen_parameters,
        frozen_other_tensors=others.frozen_tensors,
    )


def _matrices_after_dropout(layer: nn.Module) -> set[int]:
    """The ids of the modules A of LoRA adapters whose input passes a dropout."""
    return {
        id(adapter.lora_A[name])  # type: ignore[index]
        for adapter in layer.modules()
        for name, dropout in getattr(adapter, "lora_dropout", {}).items()
        if getattr(dropout, "p", 0.0) > 0.0 and name in adapter.lora_A  # type: ignore[operator]
    }


def _expert_shape(name: str, weight: nn.Parameter, hidden: int) -> tuple[int, int]:
    """Inputs and outputs of experts in one tensor, [experts, outputs, inputs] or, in some families, transposed."""
    first, second = weight.shape[1:]
    transposed = (second == hidden != first) if "down" in name else (first == hidden != second)
    return (first, second) if transposed else (second, first)


def _merge_experts(linears: Iterable[Linear], experts: tuple[int, int] | None) -> list[Linear]:
    """Merge experts that are modules ("experts.0.up_proj", "experts.1.up_proj", ...) into copies of one matrix."""
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
    """The number of experts, and of those that a token passes through; None without experts."""
    counts: list[int] = []
    for keys in (
        ("num_local_experts", "num_experts", "n_routed_experts"),
        ("num_experts_per_tok", "moe_topk", "moe_k"),
    ):
        values = [value for key in keys if isinstance(value := getattr(config, key, None), int)]
        counts.append(values[0] if values else 1)
    return (counts[0], counts[1]) if counts[0] > 1 else None


def _declared_splits(config: Any) -> Mapping[str, Split]:
    """The split of matrices by tensor parallelism, by name: from the family's record, or from transformers' plan.

    Names are relative to the layer. Matrices that are in neither are left out.
    """
    family = FAMILIES.get(config.model_type)
    if family is not None and isinstance(family.tensor_parallel, tuple):
        splits: dict[str, Split] = {}
        for block in family.tensor_parallel:
            splits |= {**dict.fromkeys(block.columns, "column"), block.row: "row"}
        return splits
    splits = {}
    for pattern, style in (getattr(config, "base_model_tp_plan", None) or {}).items():
        name = pattern.partition(".*.")[2]
        # "colwise_gather_output" and "packed_colwise" split the outputs too.
        splits[name] = "column" if "colwise" in style else "row" if "rowwise" in style else "none"
    return splits


def _with_splits(linears: list[Linear], declared: Mapping[str, Split]) -> list[Linear]:
    """The matrices with their splits: the declared split, or one by name in a module without a declaration.

    A split by name needs a module with both kinds, because a row-split matrix sums what a column-split one splits.
    """
    covered = {_module_of(name) for name in declared}
    columns, rows = _names_by_split()
    by_name: dict[str, Split] = {}
    kinds: dict[str, set[Split]] = {}
    for linear in linears:
        module, _, last = linear.name.rpartition(".")
        if module not in covered:
            by_name[linear.name] = "column" if last in columns else "row" if last in rows else "none"
            kinds.setdefault(module, set()).add(by_name[linear.name])
    result: list[Linear] = []
    for linear in linears:
        split = declared.get(linear.name, "none")
        if linear.name in by_name and {"column", "row"} <= kinds[_module_of(linear.name)]:
            split = by_name[linear.name]
        if linear.stacked and split != "none":
            # A declaration names the sides of the tensor, which some families store transposed.
            split = "row" if "down" in linear.name else "column"
        result.append(replace(linear, split=split))
    return result


def _names_by_split() -> tuple[set[str], set[str]]:
    """The last parts of the names of matrices that any family declares as column-split, and as row-split."""
    blocks = _declared_blocks()
    columns = {_last(name) for block in blocks for name in block.columns}
    return columns, {_last(block.row) for block in blocks}


def _names_of_fused_qkv() -> set[str]:
    """The last parts of the names of matrices that any family declares to have queries, keys and values together."""
    return {_last(*block.columns) for block in _declared_blocks() if block.is_attention and len(block.columns) == 1}


def _declared_blocks() -> list[TPBlock]:
    return [
        block
        for family in FAMILIES.values()
        if isinstance(family.tensor_parallel, tuple)
        for block in family.tensor_parallel
    ]


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _linear_attention(config: Any) -> tuple[int, int, int, int]:
    """Heads of values, heads of keys, elements of a head, and elements of the state, of linear attention."""
    heads = getattr(config, "linear_num_value_heads", None) or getattr(config, "linear_num_heads", None)
    head_dim = getattr(config, "linear_value_head_dim", None) or getattr(config, "linear_head_dim", None)
    heads, head_dim = int(heads or config.num_attention_heads), int(head_dim or _head_dim(config))
    key_heads = int(getattr(config, "linear_num_key_heads", None) or heads)
    key_dim = int(getattr(config, "linear_key_head_dim", None) or head_dim)
    return heads, key_heads, head_dim, heads * key_dim * head_dim


def _head_dim(config: Any) -> int:
    # Multi-head latent attention has a qk_head_dim. Its head_dim is the rotary part only. Where its values are narrower
    # than its queries and keys, the mean of both gives the right work and the right memory.
    query, value = getattr(config, "qk_head_dim", None), getattr(config, "v_head_dim", None)
    if isinstance(query, int) and isinstance(value, int):
        return (query + value) // 2
    for key in ("qk_head_dim", "head_dim"):
        if isinstance(value := getattr(config, key, None), int):
            return value
    return int(config.hidden_size) // int(config.num_attention_heads)


def _kv_heads(linears: Iterable[Linear], heads: int, head_dim: int, config: Any) -> int:
    """The key-value heads that the outputs of the matrices show, else those of the configuration."""
    fused = _names_of_fused_qkv()
    for linear in linears:
        last = _last(linear.name)
        if last == "k_proj":
            return max(1, linear.outputs // head_dim)
        if last in fused:
            return max(1, (linear.outputs // head_dim - heads) // 2)
    return int(getattr(config, "num_key_value_heads", None) or heads)
