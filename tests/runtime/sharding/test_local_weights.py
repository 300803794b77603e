"""Each rank reads its own shards of a checkpoint: the same bits as cut from the full model, and little memory."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from moreh.runtime.sharding.lazy_parameters import file_data
from moreh.runtime.sharding.local_weights import (
    convert_parameters,
    converted_parameters,
    is_lazy_model,
    materialize_local_shards,
)
from moreh.runtime.sharding.spec import ParamSpec, shard_boxes
from tests.helpers.models.checkpoint_models import GRIDS, Grid, build_model, lazy_loading, specs_of
from tests.helpers.tensor_cases import local_part
from tests.helpers.workers import run_on_workers


@pytest.fixture
def lazily():
    with lazy_loading():
        yield


class PartlyFloat32(LlamaForCausalLM):
    _keep_in_fp32_modules_strict = ("norm", "q_proj")


def resident(kind):
    """Anonymous memory (RssAnon) or mapped files (RssFile) of this process, in bytes."""
    return int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024


# How a script may call from_pretrained: on what class, with what arguments. Then the family, and how it was saved.
CALLS = {
    "own dtype": (AutoModelForCausalLM, {}, "llama", {}),
    "bfloat16": (AutoModelForCausalLM, {"dtype": torch.bfloat16}, "llama", {}),
    "its name": (LlamaForCausalLM, {"dtype": "float16"}, "llama", {"max_shard_size": "3KB"}),
    "older argument": (AutoModelForCausalLM, {"torch_dtype": torch.float64}, "llama", {}),
    "auto": (AutoModelForCausalLM, {"dtype": "auto"}, "llama", {"dtype": torch.bfloat16}),
    "float32 of bfloat16": (AutoModelForCausalLM, {"dtype": torch.float32}, "llama", {"dtype": torch.bfloat16}),
    "some in float32": (PartlyFloat32, {"dtype": torch.float16}, "llama", {"dtype": torch.bfloat16}),
    "tied": (AutoModelForCausalLM, {"dtype": torch.bfloat16}, "gpt2", {}),
    "merged experts": (AutoModelForCausalLM, {"dtype": torch.bfloat16}, "mixtral", {}),
    "subfolder": (AutoModelForCausalLM, {"dtype": torch.bfloat16, "subfolder": "part"}, "llama", {"subfolder": "part"}),
    "pickled": (LlamaForCausalLM, {"dtype": torch.bfloat16}, "llama", {"pickled": True}),
    "missing": (AutoModelForCausalLM, {"dtype": torch.bfloat16}, "llama", {"without": "model.norm.weight"}),
    "base model": (
        LlamaForCausalLM,
        {"dtype": torch.bfloat16},
        "llama",
        {"base": True, "changes": {"tie_word_embeddings": True}},
    ),
    "config given": (AutoModelForCausalLM, {"dtype": "bfloat16", "config": "given"}, "llama", {}),
    "loading info": (AutoModelForCausalLM, {"dtype": "bfloat16", "output_loading_info": True}, "llama", {}),
}


def write_checkpoint(
    directory,
    family,
    dtype=torch.float32,
    subfolder="",
    pickled=False,
    without=None,
    base=False,
    changes=None,
    **save_kwargs,
):
    model = build_model(family, **changes or {}).to(dtype)
    (model.model if base else model).save_pretrained(directory / subfolder, **save_kwargs)
    file = directory / subfolder / "model.safetensors"
    if pickled:
        torch.save(load_file(file), directory / "pytorch_model.bin")
        file.unlink()
    if without:
        save_file({name: tensor for name, tensor in load_file(file).items() if name != without}, file, {"format": "pt"})


def load(directory, model_class, kwargs):
    if kwargs.get("config") == "given":
        kwargs = kwargs | {"config": AutoConfig.from_pretrained(directory)}
    result = model_class.from_pretrained(directory, **kwargs)
    return result[0] if kwargs.get("output_loading_info") else result


def assert_same_shard(local, expected):
    assert local.is_contiguous()
    assert local.dtype == expected.dtype
    assert torch.equal(local.flatten(), expected.flatten())
    assert expected.numel() == 0 or local.shape == expected.shape


def load_and_compare(directory, model_class, kwargs, grid):
    """A rank's shards against boxes of the model as transformers alone loads it; the dtypes in memory before that."""
    mesh = grid.mesh()
    full_model = load(directory, model_class, kwargs)
    with lazy_loading():
        model = load(directory, model_class, kwargs)
        assert is_lazy_model(model)
        specs = specs_of(full_model, grid)
        assert dtypes_of(model) == {name: spec.dtype for name, spec in specs.items()}
        lazy_dtypes = {file_data(parameter).dtype for parameter in model.parameters()}
        local_tensors = materialize_local_shards(model, specs, mesh)
        assert not is_lazy_model(model)
    for name, parameter in full_model.named_parameters():
        spec = specs[name]
        assert (name in local_tensors) == (mesh.rank("pipeline") in spec.pipeline_ranks)
        if name in local_tensors:
            boxes = shard_boxes(spec, mesh.rank("tensor"), mesh.size("tensor"), mesh.rank("data"), mesh.size("data"))
            dim = 0 if spec.tp_split is None else spec.tp_split.dim
            assert_same_shard(local_tensors[name], local_part(parameter.detach(), boxes, dim))
    return lazy_dtypes


@pytest.mark.parametrize("call", CALLS)
def test_shards_are_those_of_the_full_model(tmp_path, call):
    model_class, kwargs, family, saved = CALLS[call]
    write_checkpoint(tmp_path, family, **saved)
    grids = GRIDS if call == "bfloat16" else GRIDS[1:4]
    cases = [(tmp_path, model_class, kwargs, grid) for grid in grids]
    lazy_dtypes = set().union(
        *(dtypes for ranks in run_on_workers(load_and_compare, cases, size=4) for dtypes in ranks)
    )
    # The data is that of the file until the model is sharded. Where transformers itself loads, it is the target.
    loaded = {"pickled": {torch.bfloat16}, "missing": {torch.float32, torch.bfloat16}}
    assert lazy_dtypes == loaded.get(call, {saved.get("dtype", torch.float32)})


def test_comparison_of_shards_finds_a_nan():
    expected = torch.ones(3)
    assert_same_shard(expected.clone(), expected)
    for actual in (torch.tensor([1.0, float("nan"), 1.0]), torch.tensor([1.0, 2.0, 1.0])):
        with pytest.raises(AssertionError):
            assert_same_shard(actual, expected)


def dtypes_of(model):
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def addresses(model):
    return {name: file_data(parameter).data_ptr() for name, parameter in model.named_parameters()}


def test_a_lazy_model_ignores_moves_and_remembers_casts(tmp_path, lazily):
    write_checkpoint(tmp_path, "llama", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = addresses(model)
    steps = [
        (lambda: model.cuda(), torch.bfloat16),
        (lambda: model.to("cuda"), torch.bfloat16),
        (lambda: model.to(torch.device("cuda", 0), torch.float32), torch.float32),
        (lambda: model.double(), torch.float64),
        (lambda: model.float().cpu().cuda(0).train(), torch.float32),
        (lambda: model.to(torch.zeros(1, dtype=torch.bfloat16)), torch.bfloat16),
        (lambda: model.to(device="cuda", dtype=torch.float16), torch.float16),
        (lambda: model.half(), torch.float16),
    ]
    for step, dtype in steps:
        assert step() is model
        assert set(dtypes_of(model).values()) == {dtype}
        assert addresses(model) == before
    materialize_local_shards(model, {}, None)
    assert model.half().dtype == torch.float16


@pytest.mark.parametrize("copy_model", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_lazy_model_is_lazy_by_itself(tmp_path, lazily, copy_model):
    write_checkpoint(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    copied = copy_model(model)
    assert copied.half() is copied
    assert set(dtypes_of(copied).values()) == {torch.float16}
    assert set(dtypes_of(model).values()) == {torch.bfloat16}
    materialize_local_shards(copied, {}, None)
    assert copied.half().dtype == torch.float16
    assert is_lazy_model(model)


def test_a_lazy_model_inside_another_module_is_left_alone(tmp_path, lazily):
    write_checkpoint(tmp_path, "llama", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    before = addresses(model)
    outer = nn.ModuleDict({"model": model, "head": nn.Linear(3, 4)})
    assert set(dtypes_of(outer.cuda()).values()) == {torch.float32}
    outer.to(torch.float16)
    assert outer["head"].weight.dtype == torch.float16
    assert set(dtypes_of(outer).values()) == {torch.float16}
    assert addresses(model) == before
    # Adapters give weights other names; resized embeddings are other parameters.
    attention = model.model.layers[0].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj)
    model.resize_token_embeddings(40)
    assert model.lm_head.weight.dtype == torch.float16
    assert set(dtypes_of(outer).values()) == {torch.float16}
    materialize_local_shards(outer, {}, None)
    assert {parameter.dtype for parameter in outer.double().parameters()} == {torch.float64}


def test_a_parameter_of_another_shape_than_its_spec_is_refused():
    spec = ParamSpec("model.norm.weight", (17,), torch.float32, (0,))
    with pytest.raises(ValueError, match=r"model.norm.weight has the shape \(16,\), but its spec was made for \(17,\)"):
        materialize_local_shards(build_model("llama"), {"model.norm.weight": spec}, None)


def grow_while_loading(directory):
    """Bytes that a rank's anonymous memory grows by loading, and by that and sharding, and the bytes of its shards."""
    grid = Grid(1, 1, 4)
    mesh = grid.mesh()
    with lazy_loading():
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)  # what the first call leaves behind
        start = resident("RssAnon")
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).cuda()
    loaded = resident("RssAnon") - start
    local_tensors = materialize_local_shards(model, specs_of(model, grid), mesh)
    return loaded, resident("RssAnon") - start, sum(local.nbytes for local in local_tensors.values())


def test_a_rank_needs_memory_for_its_own_shards_only(tmp_path):
    changes = {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 8192}
    write_checkpoint(tmp_path, "llama", torch.bfloat16, changes=changes)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 2.4e7
    for loaded, sharded, share in run_on_workers(grow_while_loading, [(tmp_path,)], size=4)[0]:
        assert share < size / 4 * 2 * 1.2  # the file is in bfloat16, the shards are in float32
        assert loaded < size / 12
        assert sharded < 1.2 * share + size / 12


def test_model_that_is_called_whole_has_the_dtype_that_was_asked_for(lazily, tmp_path):
    build_model("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    before = addresses(model)
    with converted_parameters(model):
        assert {file_data(parameter).dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert addresses(model) == before
    convert_parameters(model)
    assert {file_data(parameter).dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert is_lazy_model(model)
    assert convert_parameters(model) == []


def test_model_that_each_worker_computes_whole_is_loaded_as_always(lazily, tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=50, **shape)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.float().parameters()} == {torch.float32}
    assert not is_lazy_model(model)
