"""When bfloat16 is chosen, and what of a model's outputs is cast back to float32."""

import itertools

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput

from moreh.errors import CheckpointError
from moreh.runtime.checkpoint.manifest import Manifest, read_manifest, write_manifest
from moreh.runtime.engine.checkpoint_api import load_training, save_training
from moreh.runtime.kernels import precision
from moreh.runtime.kernels.precision import autocast_if, choose_bfloat16, in_float32, inside_autocast

CPU = torch.device("cpu")
LOW = torch.ones(2, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    """Nothing has been chosen yet, and no checkpoint was read."""
    monkeypatch.setattr(precision, "_CHOSEN", {})
    monkeypatch.setattr(precision, "_OF_CHECKPOINT", {})


@pytest.mark.parametrize(("speedup", "chosen"), [(precision.MIN_SPEEDUP, True), (1.19, False), (0.4, False)])
def test_bfloat16_is_chosen_where_it_is_faster_by_a_margin(monkeypatch, speedup, chosen):
    monkeypatch.setattr(precision, "bfloat16_speedup", lambda device: speedup)
    assert choose_bfloat16(CPU, requested=True) is chosen


@pytest.mark.parametrize(("device", "requested"), [(CPU, False), (torch.device("meta"), True)])
def test_nothing_is_measured_unless_bfloat16_is_requested_on_a_real_device(monkeypatch, device, requested):
    monkeypatch.setattr(precision, "bfloat16_speedup", None)
    assert not choose_bfloat16(device, requested=requested)


@pytest.mark.parametrize("of_checkpoint", [True, False])
def test_training_that_goes_on_computes_as_its_checkpoint_did(monkeypatch, caplog, of_checkpoint):
    """The timing, which comes out differently today, decides only on another type of device."""
    monkeypatch.setattr(precision, "bfloat16_speedup", lambda device: 1.0 if of_checkpoint else 2.0)
    precision.choose_as({"cpu": of_checkpoint})
    assert choose_bfloat16(CPU, requested=True) is of_checkpoint
    assert precision.chosen_precisions() == {"cpu": of_checkpoint}
    assert not choose_bfloat16(CPU, requested=False)
    precision.choose_as({"cuda": of_checkpoint})
    assert choose_bfloat16(CPU, requested=True) is not of_checkpoint


@pytest.mark.parametrize("of_checkpoint", [True, False])
def test_precision_is_written_to_checkpoints_and_read_from_them(monkeypatch, tmp_path, of_checkpoint):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monkeypatch.setattr(precision, "bfloat16_speedup", lambda device: 2.0 if of_checkpoint else 1.0)
    choose_bfloat16(CPU, requested=True)
    save_training(model, [optimizer], tmp_path / "step-1", {}).result()
    precision._CHOSEN.clear()
    monkeypatch.setattr(precision, "bfloat16_speedup", lambda device: 1.0 if of_checkpoint else 2.0)
    load_training(model, [optimizer], tmp_path / "step-1")
    assert choose_bfloat16(CPU, requested=True) is of_checkpoint


@pytest.mark.parametrize("precisions", [5, [1], {"cpu": "yes"}, None])
def test_precision_that_nobody_writes_is_refused(tmp_path, precisions):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    save_training(model, [optimizer], tmp_path / "step-1", {}).result()
    manifest = read_manifest(tmp_path / "step-1")
    write_manifest(tmp_path / "step-1", Manifest(manifest.files, {**manifest.about, "bfloat16": precisions}))
    with pytest.raises(CheckpointError, match="is not what save_training writes: bfloat16 is"):
        load_training(model, [optimizer], tmp_path / "step-1")


def test_speedup_is_measured():
    assert 0.01 < precision.bfloat16_speedup(CPU) < 100


@pytest.mark.parametrize("speedup", [0.5, 4.0])
def test_other_programs_do_not_decide(monkeypatch, speedup):
    """They slow most matmuls down, bfloat16 ones more than the others or less, and never speed one up."""
    slowdowns = itertools.cycle([9.0, 1.0, 30.0, 2.0, 1.0, 70.0, 5.0])

    def seconds(matrix):
        return next(slowdowns) * (1.0 if matrix.dtype == torch.float32 else 1 / speedup)

    monkeypatch.setattr(precision, "_matmul_seconds", seconds)
    assert precision.bfloat16_speedup(CPU) == speedup


def test_outputs_are_cast_to_float32_wherever_they_are():
    nested = {"a": (LOW, [LOW]), "b": 3, "c": torch.ones(1, dtype=torch.float64)}
    outputs = in_float32(CausalLMOutput(loss=LOW.sum(), logits=nested))
    first, (second,) = outputs.logits["a"]
    assert {tensor.dtype for tensor in (outputs.loss, first, second)} == {torch.float32}
    assert outputs.logits["b"] == 3
    assert outputs.logits["c"].dtype == torch.float64
    assert in_float32(None) is None


def test_autocast_of_the_script_is_seen_even_if_it_is_off():
    assert not inside_autocast()
    with torch.autocast("cpu", enabled=False):
        assert inside_autocast()
    assert not inside_autocast()


def test_autocast_only_if_bfloat16_is_chosen():
    with autocast_if(True, "cpu"):
        assert torch.is_autocast_enabled("cpu")
    with autocast_if(False, "cpu"):
        assert not torch.is_autocast_enabled("cpu")
