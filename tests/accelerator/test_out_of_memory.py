"""The simulated out-of-memory error: when it is raised and what it says."""

import gc

import pytest
import torch

from moreh.accelerator.job import local_job
from moreh.accelerator.memory.ledger import adamw_training_bytes, weight_bytes
from moreh.accelerator.memory.out_of_memory import SimulatedOutOfMemoryError

IDS = torch.arange(32).reshape(2, 16)


@pytest.fixture(autouse=True)
def _no_garbage():
    """Frees what other tests left in reference cycles, which would be freed while a limit is tested."""
    gc.collect()


def describe(billions):
    """A GPT-2 shape on the meta device: 13 or 1.5 billion parameters."""
    from transformers import AutoModelForCausalLM, GPT2Config

    layers, width = {13: (40, 5120), 1.5: (48, 1600)}[billions]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(GPT2Config(n_layer=layers, n_embd=width, n_head=40, n_positions=2048))


def test_13b_model_on_the_meta_device_does_not_fit_one_device():
    model = describe(13)
    parameters = sum(p.numel() for p in model.parameters())
    assert 12.8e9 < parameters < 13.2e9
    assert adamw_training_bytes(model) == 16 * parameters + sum(b.nbytes for b in model.buffers())
    with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
        model.cuda()
    message = str(caught.value)
    assert isinstance(caught.value, RuntimeError)
    for part in (
        "Error Code 4: OUT_OF_MEMORY (simulated)",
        f"out of memory: requested {adamw_training_bytes(model)} bytes",
        "of the 65520 MiB that one device",
        "torch.moreh.option.enable_advanced_parallelization()",
        "moreh-switch-model",
        "smaller batch",
    ):
        assert part in message
    with pytest.raises(torch.cuda.OutOfMemoryError):
        model.to("cuda")


def test_model_that_fits_gives_torchs_own_error_on_the_meta_device():
    with pytest.raises(NotImplementedError, match="no data"):
        describe(1.5).cuda()


@pytest.mark.parametrize("stage", ["weights", "tensor", "forward", "gradients", "optimizer"])
def test_out_of_memory_where_the_device_would_be_full(make_gpt2, monkeypatch, stage):
    job = local_job()
    model = make_gpt2(n_layer=4)
    weights = weight_bytes(model)

    def limit(bytes_above_now):
        used = job.ledger.total_bytes()
        monkeypatch.setattr(type(job), "capacity_bytes", property(lambda _: used + bytes_above_now))

    if stage == "weights":
        limit(weights - 1)
        with pytest.raises(SimulatedOutOfMemoryError, match="the weights of the model"):
            model.cuda()
        limit(weights)
        model.cuda()
        return
    if stage == "tensor":
        limit(399)
        with pytest.raises(SimulatedOutOfMemoryError, match="requested 400 bytes for a tensor"):
            torch.zeros(100, device="cuda")
        return
    model.cuda()
    ids = IDS.cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    if stage == "forward":
        limit(1000)
        with pytest.raises(SimulatedOutOfMemoryError, match="activations"):
            model(ids, labels=ids, use_cache=False)
        with torch.no_grad():
            model(ids, labels=ids, use_cache=False)  # without gradients there is room
        return
    model(ids, labels=ids, use_cache=False).loss.backward()
    if stage == "gradients":
        limit(-1)
        with pytest.raises(SimulatedOutOfMemoryError, match="the gradients"):
            optimizer.step()
    else:
        limit(weights)  # AdamW needs twice as much
        with pytest.raises(SimulatedOutOfMemoryError, match="the optimizer state"):
            optimizer.step()


def test_hook_allows_all_devices(run_python_forked):
    source = """
import torch
from transformers import AutoModelForCausalLM, GPT2Config
torch.moreh.option.enable_advanced_parallelization()
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=40, n_embd=5120, n_head=40))
try:
    model.cuda()
except NotImplementedError as error:
    print("fits:", error)
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=160, n_embd=5120, n_head=40))
try:
    model.cuda()
except torch.OutOfMemoryError as error:
    print(error)
"""
    said = run_python_forked(source).stdout
    assert "fits: Cannot copy out of meta tensor" in said
    assert "8 device(s) of accelerator 0 (xLarge.512GB) have together" in said
