"""Each rank takes its own parts of a checkpoint: the same bits as cut from the whole model, and little memory."""

import contextlib
import copy
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from moreh.errors import OptionError, WorkerError
from moreh.runtime.checkpoint.state_dict import ShardedStateDict, load_whole_state_dict, state_dict_of
from moreh.runtime.sharding.local_weights import (
    is_lazy_model,
    materialize_local_shards,
    patch_lazy_loading,
    target_dtypes,
)
from moreh.runtime.sharding.mesh import make_mesh
from moreh.runtime.sharding.spec import ParamSpec, shard_boxes
from tests.helpers.tensor_cases import local_part
from tests.helpers.workers import run_on_workers
from tests.runtime.checkpoint.test_hf_save import GRIDS, build, empty_model, param_specs_of


@contextlib.contextmanager
def weights_on_disk():
    """from_pretrained as in one of several workers."""
    load, load_files = vars(PreTrainedModel)["from_pretrained"], vars(PreTrainedModel)["_load_pretrained_model"]
    apply = nn.Module._apply
    patch_lazy_loading()
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained, PreTrainedModel._load_pretrained_model, nn.Module._apply = (
            load,
            load_files,
            apply,
        )


@pytest.fixture
def on_disk():
    with weights_on_disk():
        yield


class PartlyFloat32(LlamaForCausalLM):
    _keep_in_fp32_modules_strict = ("norm", "q_proj")


def resident(kind):
    """Anonymous memory (RssAnon) or mapped files (RssFile) of this process, in bytes."""
    return int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024


TIED = {"tie_word_embeddings": True}
# How a script may call it: class, positional and keyword arguments of from_pretrained; then the family and how it was saved.
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
    **settings,
):
    model = build(family, **changes or {}).to(dtype)
    (model.model if base else model).save_pretrained(directory / subfolder, **settings)
    file = directory / subfolder / "model.safetensors"
    if pickled:
        torch.save(load_file(file), directory / "pytorch_model.bin")
        file.unlink()
    if without:
        save_file({name: tensor for name, tensor in load_file(file).items() if name != without}, file, {"format": "pt"})


def load(directory, model_class, settings):
    if settings.get("config") == "given":
        settings = settings | {"config": AutoConfig.from_pretrained(directory)}
    loaded = model_class.from_pretrained(directory, **settings)
    return loaded[0] if settings.get("output_loading_info") else loaded


def take_and_compare(directory, model_class, settings, grid):
    """The parts that a rank takes, against boxes of the model as transformers alone loads it."""
    mesh = make_mesh(*grid[:3])
    expected = load(directory, model_class, settings)
    with weights_on_disk():
        model = load(directory, model_class, settings)
        assert is_lazy_model(model)
        stored = {parameter.dtype for parameter in model.parameters()}
        dtypes = target_dtypes(model)
        layouts = param_specs_of(expected, grid[0], grid[2], grid[3])
        assert dtypes == {name: layout.dtype for name, layout in layouts.items()}
        parts = materialize_local_shards(model, layouts, mesh)
        assert not is_lazy_model(model)
    for name, parameter in expected.named_parameters():
        layout = layouts[name]
        assert (name in parts) == (mesh.rank("pipeline") in layout.pipeline_ranks)
        if name in parts:
            held = shard_boxes(layout, mesh.rank("tensor"), mesh.size("tensor"), mesh.rank("data"), mesh.size("data"))
            cut = local_part(parameter.detach(), held, 0 if layout.division is None else layout.division.dim)
            assert parts[name].is_contiguous()
            assert parts[name].dtype == cut.dtype
            assert torch.equal(parts[name].flatten(), cut.flatten())
            assert cut.numel() == 0 or parts[name].shape == cut.shape
    return stored


@pytest.mark.parametrize("call", CALLS)
def test_parts_are_those_of_the_whole_model(tmp_path, call):
    model_class, settings, family, saved = CALLS[call]
    write_checkpoint(tmp_path, family, **saved)
    grids = GRIDS if call == "bfloat16" else GRIDS[1:4]
    cases = [(tmp_path, model_class, settings, grid) for grid in grids]
    stored = set().union(*(kinds for ranks in run_on_workers(take_and_compare, cases, size=4) for kinds in ranks))
    # The dtype is that of the file until parts are taken. Where transformers itself loads, it is the wanted one.
    wanted = {"pickled": {torch.bfloat16}, "missing": {torch.float32, torch.bfloat16}}
    assert stored == wanted.get(call, {saved.get("dtype", torch.float32)})


def test_moves_are_ignored_and_casts_remembered(tmp_path, on_disk):
    write_checkpoint(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    steps = [
        (lambda: model.cuda(), torch.bfloat16),
        (lambda: model.to("cuda"), torch.bfloat16),
        (lambda: model.to(torch.device("cuda", 0), torch.float16), torch.float16),
        (lambda: model.to(device="cuda", dtype=torch.float32), torch.float32),
        (lambda: model.half(), torch.float16),
        (lambda: model.float(), torch.float32),
        (lambda: model.bfloat16().cpu().cuda(0).train(), torch.bfloat16),
        (lambda: model.to(torch.zeros(1, dtype=torch.float64)), torch.float64),
    ]
    for step, dtype in steps:
        assert step() is model
        assert set(target_dtypes(model).values()) == {dtype}
        assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    materialize_local_shards(model, {}, None)
    assert model.half().dtype == torch.float16


def test_a_model_inside_another_module_is_left_alone_too(tmp_path, on_disk):
    write_checkpoint(tmp_path, "llama", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    outer = nn.ModuleDict({"model": model, "head": nn.Linear(3, 4)})
    assert set(target_dtypes(outer.cuda()).values()) == {torch.float32}
    outer.to(torch.float16)
    assert outer["head"].weight.dtype == torch.float16
    assert set(target_dtypes(outer).values()) == {torch.float16}
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    # Adapters give weights other names; resized embeddings are other parameters.
    attention = model.model.layers[0].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj)
    model.resize_token_embeddings(40)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert set(target_dtypes(outer).values()) == {torch.float16}
    materialize_local_shards(outer, {}, None)
    assert {parameter.dtype for parameter in outer.double().parameters()} == {torch.float64}


@pytest.mark.parametrize("setting", [{"device_map": "auto"}, {"device_map": {"": 0}}, {"tp_plan": "auto"}])
def test_placing_weights_oneself_is_refused(tmp_path, on_disk, setting):
    write_checkpoint(tmp_path, "llama")
    (name,) = setting
    for model_class in (AutoModelForCausalLM, LlamaForCausalLM):
        with pytest.raises(OptionError, match=rf"given {name}=.*the plan .*Leave {name} out"):
            model_class.from_pretrained(tmp_path, **setting)


def test_files_of_another_shape_than_the_layout_are_refused():
    with pytest.raises(
        ValueError, match=r"model.norm.weight has the shape \(16,\), but its layout was made for \(17,\)"
    ):
        materialize_local_shards(
            build("llama"), {"model.norm.weight": ParamSpec("model.norm.weight", (17,), torch.float32, (0,))}, None
        )


def grow_while_loading(directory):
    """How much anonymous memory a rank needs beyond what it holds after loading, for 24 MB in bfloat16 as float32."""
    mesh = make_mesh(1, 1, 4)
    with weights_on_disk():
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)  # what the first call leaves behind
        start = resident("RssAnon")
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).cuda()
    loaded = resident("RssAnon") - start
    parts = materialize_local_shards(model, param_specs_of(model, 1, 4, False), mesh)
    return loaded, resident("RssAnon") - start, sum(part.nbytes for part in parts.values())


def test_a_rank_needs_memory_for_its_own_part_only(tmp_path):
    changes = {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 8192}
    write_checkpoint(tmp_path, "llama", torch.bfloat16, changes=changes)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 2.4e7
    for loaded, taken, share in run_on_workers(grow_while_loading, [(tmp_path,)], size=4)[0]:
        assert share < size / 3  # in bfloat16 here
        assert loaded < size / 12
        assert taken < 1.2 * share + size / 12


def round_trip_of_state_dicts(grid):
    mesh = make_mesh(*grid[:3])
    model, other = build("gpt2"), build("gpt2")
    whole = {name: tensor * 3 for name, tensor in model.state_dict().items()}
    layouts = param_specs_of(model, grid[0], grid[2], grid[3])
    parts = materialize_local_shards(model, layouts, mesh)
    empty_model(model, parts)
    result = load_whole_state_dict(model, whole, layouts, parts, mesh)
    assert result == ([], [])
    other.load_state_dict(whole)
    for name, part in materialize_local_shards(other, layouts, mesh).items():
        assert torch.equal(part, parts[name])
    own = state_dict_of(model, parts, rank=3)
    held = parts.keys() | ({"lm_head.weight"} if "transformer.wte.weight" in parts else set())
    assert list(own) == [name for name in whole if name in held]
    kept = copy.deepcopy(own)
    assert own.copy().rank == kept.rank == 3
    for tensor in parts.values():
        tensor.zero_()
    assert load_whole_state_dict(model, kept, layouts, parts, mesh) == ([], [])
    for name, part in materialize_local_shards(other, layouts, mesh).items():
        assert torch.equal(part, parts[name])
    return len(own)


def test_whole_state_dicts_are_loaded_into_parts():
    whole = len(build("gpt2").state_dict())
    for grid, held in zip(
        GRIDS, run_on_workers(round_trip_of_state_dicts, [(grid,) for grid in GRIDS], size=4), strict=True
    ):
        assert max(held) < whole or grid[0] == 1


def test_a_part_is_not_written_as_if_it_were_the_whole(tmp_path):
    state = ShardedStateDict({"weight": torch.ones(2)}, rank=3)
    with pytest.raises(WorkerError, match=r"part of rank 3 only.*save_pretrained.*save_training"):
        torch.save(state, tmp_path / "state.pt")
    with pytest.raises(WorkerError, match="part of rank 3 only"):
        torch.save({"model": state}, tmp_path / "state.pt")


def test_a_state_dict_that_does_not_fit_changes_nothing():
    model = build("llama")
    layouts = param_specs_of(model, 1, 1, False)
    parts = materialize_local_shards(model, layouts, None)
    before = {name: part.clone() for name, part in parts.items()}
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    del state["model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"missing keys \['model.norm.weight'\]; unexpected keys \['more'\]"):
        load_whole_state_dict(model, state | {"more": torch.ones(1)}, layouts, parts, None)
    with pytest.raises(RuntimeError, match=r"lm_head.weight has the shape \(2,\) instead of \(31, 16\)"):
        load_whole_state_dict(model, state | {"lm_head.weight": torch.ones(2)}, layouts, parts, None, strict=False)
    assert all(torch.equal(before[name], part) for name, part in parts.items())
    result = load_whole_state_dict(model, state | {"more": torch.ones(1)}, layouts, parts, None, strict=False)
    assert result == (["model.norm.weight"], ["more"])
    assert torch.equal(parts["lm_head.weight"], before["lm_head.weight"] + 1)
