"""Tiny models of three kinds, and how ranks may shard them, for the tests of loading, saving and resuming."""

import contextlib
from typing import NamedTuple

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from moreh.patches.lazy_loading import uninstall_lazy_loading
from moreh.runtime.sharding.local_weights import patch_lazy_loading
from moreh.runtime.sharding.mesh import make_mesh
from moreh.runtime.sharding.spec import ParamSpec, TPSplit

SIZES = {"vocab_size": 31, "bos_token_id": 0, "eos_token_id": 1}
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Grid(NamedTuple):
    """Numbers of ranks, and whether data-parallel ranks shard."""

    pipeline: int
    data: int
    tensor: int
    fsdp: bool = False

    def mesh(self):
        return make_mesh(self.pipeline, self.data, self.tensor)


# Of four ranks.
GRIDS = [
    Grid(1, 1, 4),
    Grid(2, 2, 1, fsdp=True),
    Grid(2, 1, 2),
    Grid(1, 2, 2, fsdp=True),
    Grid(1, 4, 1),
    Grid(4, 1, 1),
    Grid(1, 4, 1, fsdp=True),
]


def build_model(family, saved_buffer=False, **changes):
    """A model with tied weights (gpt2), with weights that transformers merges (mixtral), or a Llama."""
    torch.manual_seed(1)
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=9, **SIZES | changes))
    elif family == "mixtral":
        config = MixtralConfig(num_local_experts=3, num_experts_per_tok=2, **LLAMA | SIZES | changes)
        model = MixtralForCausalLM(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(**LLAMA | SIZES | changes))
    if saved_buffer:
        model.model.register_buffer("scale", torch.arange(5.0))
    return model


@contextlib.contextmanager
def lazy_loading():
    """from_pretrained as in one of several workers."""
    patch_lazy_loading()
    try:
        yield
    finally:
        uninstall_lazy_loading()


def specs_of(model, grid):
    """Specs of each kind: columns in chunks as GPT-2's, rows, vocabulary, over all pipeline ranks that have layers."""
    specs = {}
    for name, parameter in model.named_parameters():
        shape, chunk_sizes = tuple(parameter.shape), None
        if "c_attn" in name:
            dim = len(shape) - 1
            chunk_sizes = (shape[dim] // 3,) * 3
        elif len(shape) == 3 or "down_proj" in name or "o_proj" in name:
            dim = 1
        else:
            dim = 0
        tp_split = None if grid.tensor == 1 or "norm" in name else TPSplit(dim, chunk_sizes or (shape[dim],))
        if ".layers." in name or ".h." in name:
            pipeline_ranks = {int(name.split(".")[2]) % grid.pipeline}
        elif "embed" in name or "wte" in name or "wpe" in name:
            pipeline_ranks = {0, grid.pipeline - 1} if model.config.tie_word_embeddings else {0}
        else:
            pipeline_ranks = {grid.pipeline - 1} if "lm_head" in name or "norm" in name else {0}
        fsdp_dim = 0 if grid.fsdp else None
        specs[name] = ParamSpec(name, shape, parameter.dtype, tuple(sorted(pipeline_ranks)), tp_split, fsdp_dim)
    return specs


def keep_only_local(model, local_tensors):
    """Leave no weights but a rank's local tensors in a model, as after it was sharded."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    replacements = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                name = names[id(parameter)]
                tensor = local_tensors.get(name, torch.empty(3, device="meta"))
                replacement = torch.nn.Parameter(tensor, requires_grad=False)
                module._parameters[key] = replacements.setdefault(name, replacement)
