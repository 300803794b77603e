"""What a divided model saves is, byte by byte, what one worker saves."""

import filecmp
import functools

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from moreh.errors import OptionError, WorkerError
from moreh.runtime.checkpoint.hf_save import save_pretrained
from moreh.runtime.checkpoint.safetensors_writer import SafetensorsWriter, TensorKind
from moreh.runtime.sharding.gather import whole_tensor
from moreh.runtime.sharding.local_weights import materialize_local_shards
from moreh.runtime.sharding.mesh import make_mesh
from moreh.runtime.sharding.spec import ParamSpec, TPSplit
from tests.helpers.workers import run_on_workers

SIZES = {"vocab_size": 31, "bos_token_id": 0, "eos_token_id": 1}
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Pipeline, data and tensor ranks, and whether data-parallel ranks shard.
GRIDS = [
    (1, 1, 4, False),
    (2, 2, 1, True),
    (2, 1, 2, False),
    (1, 2, 2, True),
    (1, 4, 1, False),
    (4, 1, 1, False),
    (1, 4, 1, True),
]


def build(family, buffer=False, **changes):
    model = _build(family, **changes)
    if buffer:  # one that is saved
        model.model.register_buffer("scale", torch.arange(5.0))
    return model


def _build(family, **changes):
    torch.manual_seed(1)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=9, **SIZES | changes))
    if family == "mixtral":
        return MixtralForCausalLM(MixtralConfig(num_local_experts=3, num_experts_per_tok=2, **LLAMA | SIZES | changes))
    return LlamaForCausalLM(LlamaConfig(**LLAMA | SIZES | changes))


def param_specs_of(model, pipeline, tensor, shards):
    """A layout of each kind: columns in blocks as GPT-2's, rows, vocabulary, everything over the layers' pipeline ranks."""
    layouts = {}
    for name, parameter in model.named_parameters():
        shape, blocks = tuple(parameter.shape), None
        if "c_attn" in name:
            dim = len(shape) - 1
            blocks = (shape[dim] // 3,) * 3
        elif len(shape) == 3 or "down_proj" in name or "o_proj" in name:
            dim = 1
        else:
            dim = 0
        division = None if tensor == 1 or "norm" in name else TPSplit(dim, blocks or (shape[dim],))
        if ".layers." in name or ".h." in name:
            ranks = (int(name.split(".")[2]) % pipeline,)
        else:
            first, last = "embed" in name or "wte" in name or "wpe" in name, "lm_head" in name or "norm" in name
            tied = first and model.config.tie_word_embeddings
            ranks = tuple(
                sorted({0} if first and not tied else {0, pipeline - 1} if tied else {pipeline - 1} if last else {0})
            )
        layouts[name] = ParamSpec(name, shape, parameter.dtype, ranks, division, 0 if shards else None)
    return layouts


@functools.cache
def _transformers_is_quiet():
    from transformers.utils import logging

    logging.disable_progress_bar()


def save_divided(directory, family, changes, grid, settings, dtype=torch.float32):
    _transformers_is_quiet()
    pipeline, data, tensor, shards = grid
    mesh = make_mesh(pipeline, data, tensor)
    model = build(family, **changes).to(dtype)
    layouts = param_specs_of(model, pipeline, tensor, shards)
    parts = materialize_local_shards(model, layouts, mesh)
    empty_model(model, parts)
    save_pretrained(model, directory, layouts, parts, mesh, **settings)
    return sum(part.numel() for part in parts.values())


def empty_model(model, parts):
    """Leave no weights but the parts in the model, as after it is divided."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    replacements = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                name = names[id(parameter)]
                part = parts.get(name, torch.empty(3, device="meta"))
                module._parameters[key] = replacements.setdefault(name, torch.nn.Parameter(part, requires_grad=False))


def assert_same_files(first, second):
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    _, different, unreadable = filecmp.cmpfiles(first, second, names, shallow=False)
    assert (different, unreadable) == ([], [])


@pytest.mark.parametrize(
    ("family", "changes", "settings", "dtype"),
    [
        ("llama", {}, {}, torch.float32),
        ("llama", {"tie_word_embeddings": True}, {"max_shard_size": "3KB", "variant": "half"}, torch.bfloat16),
        ("llama", {"buffer": True}, {"safe_serialization": True}, torch.float32),
        ("gpt2", {}, {"max_shard_size": "9KB"}, torch.float32),
        ("mixtral", {}, {"max_shard_size": "9KB"}, torch.float32),
        ("mixtral", {}, {"save_original_format": False}, torch.float16),
    ],
)
def test_the_files_are_those_of_one_worker(tmp_path, family, changes, settings, dtype):
    expected = tmp_path / "whole"
    whole = build(family, **changes).to(dtype)
    whole.save_pretrained(expected, **settings)
    cases = [(tmp_path / f"divided{n}", family, changes, grid, settings, dtype) for n, grid in enumerate(GRIDS)]
    held = run_on_workers(save_divided, cases, size=4)
    for case, elements in zip(cases, held, strict=True):
        assert_same_files(expected, case[0])
        if case[3] != (1, 4, 1, False):
            assert max(elements) < sum(parameter.numel() for parameter in whole.parameters())  # it really was divided
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["whole", *(case[0].name for case in cases)])


def save_over(directory, family, first, second):
    """Save two models into one directory, one after the other."""
    for changes, settings in (first, second):
        save_divided(directory, family, changes, GRIDS[0], settings)


@pytest.mark.parametrize(("before", "after"), [("3KB", "50GB"), ("50GB", "3KB"), ("3KB", "9KB"), ("50GB", "50GB")])
def test_an_older_model_is_replaced_and_other_files_stay(tmp_path, before, after):
    directory, expected = tmp_path / "model", tmp_path / "expected"
    directory.mkdir()
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.fp16.safetensors").write_text("another variant")
    build("llama", hidden_size=32).save_pretrained(expected, max_shard_size=after)
    first = ({}, {"max_shard_size": before})
    run_on_workers(save_over, [(directory, "llama", first, ({"hidden_size": 32}, {"max_shard_size": after}))], size=4)
    for name in ("tokenizer.json", "model.fp16.safetensors"):
        (directory / name).unlink()  # raises where it is gone
    assert_same_files(expected, directory)


def save_on_a_full_disk(directory, after_tensors):
    """Rank 0 fails after some tensors; returns each rank's error."""
    written = []
    original = SafetensorsWriter.write

    def write(self, name, tensor):
        if len(written) == after_tensors:
            raise OSError(28, "No space left on device")
        written.append(name)
        original(self, name, tensor)

    SafetensorsWriter.write = write
    try:
        save_divided(directory, "llama", {}, (2, 1, 2, False), {"max_shard_size": "3KB"})
    except (OSError, WorkerError) as error:
        return type(error).__name__, str(error)
    finally:
        SafetensorsWriter.write = original


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_ends_all_ranks_and_leaves_nothing(tmp_path, exists):
    directory = tmp_path / "model"
    if exists:
        build("llama").save_pretrained(directory)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for errors in run_on_workers(save_on_a_full_disk, [(directory, 0), (directory, 9)], size=4):
        assert errors[0] == ("OSError", "[Errno 28] No space left on device")
        assert {kind for kind, _ in errors[1:]} == {"WorkerError"}
        assert all("Rank 0 failed while saving the model" in text and "No space left" in text for _, text in errors[1:])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def save_with_a_wrong_part(directory):
    mesh = make_mesh(2, 1, 2)
    model = build("llama")
    layouts = param_specs_of(model, 2, 2, False)
    parts = materialize_local_shards(model, layouts, mesh)
    if dist.get_rank() == 3:
        parts["lm_head.weight"] = parts["lm_head.weight"][1:]
    try:
        save_pretrained(model, directory, layouts, parts, mesh)
    except (ValueError, WorkerError) as error:
        return str(error)


def test_a_part_of_the_wrong_size_is_refused_before_anything_is_written(tmp_path):
    (errors,) = run_on_workers(save_with_a_wrong_part, [(tmp_path / "model",)], size=4)
    assert all("lm_head.weight is (14, 16) torch.float32, its layout says (15, 16)" in error for error in errors)
    assert list(tmp_path.iterdir()) == []


def save_from_wrong_boxes(directory):
    """Rank 1 takes its rows one too early: what it holds has the right size."""
    import moreh.runtime.sharding.shards as pieces

    original, mesh = pieces.shard_boxes, make_mesh(1, 1, 4)

    def shifted(*arguments):
        return [
            ((box[0][0] - 1, box[0][1] - 1), *box[1:]) if len(box) == 2 and box[0][0] else box
            for box in original(*arguments)
        ]

    model = build("llama")
    layouts = param_specs_of(model, 1, 4, False)
    if dist.get_rank() == 1:
        pieces.shard_boxes = shifted
    parts = materialize_local_shards(model, layouts, mesh)
    pieces.shard_boxes = original
    save_pretrained(model, directory, layouts, parts, mesh)


def test_the_comparison_notices_a_box_that_is_off_by_one(tmp_path):
    build("llama").save_pretrained(tmp_path / "whole")
    run_on_workers(save_from_wrong_boxes, [(tmp_path / "divided",)], size=4)
    with pytest.raises(AssertionError, match=r"model\.safetensors"):
        assert_same_files(tmp_path / "whole", tmp_path / "divided")


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ({"push_to_hub": True}, "hf upload"),
        ({"state_dict": {"a": 1}}, "leave it out"),
        ({"save_function": torch.save}, "piece by piece"),
        ({"safe_serialization": False}, "safetensors only"),
        ({"distributed_checkpoint": True}, "torch.distributed.checkpoint"),
    ],
)
def test_what_a_divided_model_cannot_do_is_refused(tmp_path, setting, remedy):
    with pytest.raises(OptionError, match=remedy):
        save_pretrained(build("llama"), tmp_path / "model", {}, {}, None, **setting)


def gather_everything(grid):
    mesh = make_mesh(*grid[:3])
    model = build("gpt2")
    layouts = param_specs_of(model, grid[0], grid[2], grid[3])
    parts = materialize_local_shards(model, layouts, mesh)
    for name, parameter in model.named_parameters():
        assert torch.equal(whole_tensor(layouts[name], parts.get(name), mesh), parameter)
    scalar = ParamSpec("scale", (), torch.float32, (grid[0] - 1,))
    local = torch.tensor(7.0) if mesh.rank("pipeline") == grid[0] - 1 else None
    return len(parts), whole_tensor(scalar, local, mesh).item()


def test_whole_tensors_are_there_on_all_ranks():
    for grid, results in zip(
        GRIDS, run_on_workers(gather_everything, [(grid,) for grid in GRIDS], size=4), strict=True
    ):
        parts = {count for count, _ in results}
        assert max(parts) < 28 or grid[0] == 1
        assert [value for _, value in results] == [7.0] * 4


def test_the_writer_agrees_with_the_library(tmp_path):
    torch.manual_seed(0)
    dtypes = [
        "bool",
        "uint8",
        "int8",
        "int16",
        "float16",
        "bfloat16",
        "int32",
        "float32",
        "float64",
        "int64",
        "complex64",
    ]
    dtypes += ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"]
    tensors = {f"{name} ü.{n}": (torch.randn(shape) * 9).abs().to(getattr(torch, name))
               for name in dtypes for n, shape in enumerate([(3, 5), (), (0, 4), (7,)])}  # fmt: skip
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    kinds = {name: TensorKind(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    writer = SafetensorsWriter(tmp_path / "ours", kinds, {"format": "pt"})
    for name in sorted(tensors, reverse=True):
        writer.write(name, tensors[name])
    read = load_file(tmp_path / "ours")
    assert all(torch.equal(read[name].view(-1), tensor.view(-1)) for name, tensor in tensors.items())
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
