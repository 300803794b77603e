"""Checkpoints of a training that cannot be written or do not fit are refused, with a sentence that says what to do."""

import copy

import pytest
import torch
import torch.distributed as dist

from moreh.errors import CheckpointError, WorkerError
from moreh.runtime.checkpoint.dcp_io import save_state_async
from moreh.runtime.checkpoint.training_state import collect_training_state, load_extra, load_training_state
from tests.helpers.models.checkpoint_models import Grid, build_model
from tests.helpers.training_states import FAMILY, load_alone, save_alone, shard_training, train
from tests.helpers.workers import run_on_workers


def save_shifted(directory):
    """Rank 1's rows begin one too early."""
    specs, local_tensors, parameters, optimizer, mesh = shard_training(*train(), Grid(1, 1, 2))
    state = collect_training_state(specs, local_tensors, [optimizer], parameters, mesh)
    chunks = state["model/transformer.wte.weight"]
    if dist.get_rank() == 1:
        chunks.views = {(offset[0] - 1, offset[1]): view for offset, view in chunks.views.items()}
    with pytest.raises((ValueError, WorkerError), match="Failed to validate global plan"):
        save_state_async(state, directory, mesh).result()


def test_chunks_that_overlap_are_refused(tmp_path):
    run_on_workers(save_shifted, [(tmp_path / "state",)], size=2)
    assert list(tmp_path.iterdir()) == []


def use_adafactor(directory):
    """Save and resume with Adafactor on sharded parameters; returns the error of saving."""
    specs, local_tensors, parameters, _, mesh = shard_training(*train(), Grid(1, 1, 2))
    optimizer = torch.optim.Adafactor(list(parameters.values()))
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    refusal = r"Adafactor keeps 'row_var' of transformer.wte.weight as a tensor \[1[56], 1\]"
    with pytest.raises(CheckpointError, match=refusal) as error:
        collect_training_state(specs, local_tensors, [optimizer], parameters, mesh)
    new = torch.optim.Adafactor(list(parameters.values()))
    with pytest.raises(CheckpointError, match="Adafactor keeps 'row_var'"):
        load_training_state(directory, specs, local_tensors, [new], parameters, mesh)
    return str(error.value)


def test_state_that_is_not_shaped_as_its_sharded_parameter_is_refused(tmp_path):
    save_alone(tmp_path / "state", torch.optim.Adafactor)
    assert "AdamW" in run_on_workers(use_adafactor, [(tmp_path / "state",)], size=2)[0][0]


def test_what_does_not_fit_is_refused_before_anything_changes(tmp_path):
    save_alone(tmp_path / "state")
    model, optimizer = train(seed=3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match="has no complete checkpoint"):
        load_extra(tmp_path / "none")
    with pytest.raises(CheckpointError, match="has no complete checkpoint"):
        load_alone(tmp_path / "none", model, [optimizer])
    with pytest.raises(CheckpointError, match=r"another model: .*lm_head|embed_tokens.weight is not in it"):
        load_alone(tmp_path / "state", build_model("llama"), [])
    with pytest.raises(CheckpointError, match=r"transformer.wte.weight is \[31, 16\], here \[33, 16\]"):
        load_alone(tmp_path / "state", build_model(FAMILY, vocab_size=33), [])
    with pytest.raises(CheckpointError, match="the state of 1 optimizers, and 2 were given"):
        load_alone(tmp_path / "state", model, [optimizer, optimizer])
    with pytest.raises(CheckpointError, match="AdamW has 1 parameter groups, the checkpoint has 2"):
        load_alone(tmp_path / "state", model, [torch.optim.AdamW(model.parameters())])
    other = torch.optim.SGD([{"params": group["params"]} for group in optimizer.param_groups])
    with pytest.raises(CheckpointError, match="has the state of AdamW, which SGD cannot use"):
        load_alone(tmp_path / "state", model, [other])
    swapped = torch.optim.AdamW([{"params": group["params"]} for group in reversed(optimizer.param_groups)])
    with pytest.raises(CheckpointError, match=r"Parameters of group 0 of AdamW were not in it.*ln_1.bias"):
        load_alone(tmp_path / "state", model, [swapped])
    for_amsgrad = torch.optim.AdamW([{"params": group["params"]} for group in optimizer.param_groups], amsgrad=True)
    with pytest.raises(
        CheckpointError, match="made with amsgrad=True, and the checkpoint has the state of amsgrad=False"
    ):
        load_alone(tmp_path / "state", model, [for_amsgrad])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("content", [b"", None])
def test_damaged_or_missing_files_are_refused(tmp_path, name, content):
    save_alone(tmp_path / "state")
    (tmp_path / "state" / name).unlink()
    if content is not None:
        (tmp_path / "state" / name).write_bytes(content)
    model, optimizer = train(seed=3)
    with pytest.raises(CheckpointError, match=r"is damaged .*Give an earlier checkpoint|has no complete checkpoint"):
        load_alone(tmp_path / "state", model, [optimizer])


def test_extra_that_cannot_be_read_back_safely_is_refused(tmp_path):
    with pytest.raises(TypeError, match="extra cannot be stored: it may consist of numbers"):
        save_alone(tmp_path / "state", extra={"lock": copy.Error("no")})
    assert list(tmp_path.iterdir()) == []
