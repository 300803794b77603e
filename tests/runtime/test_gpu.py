"""What only a GPU can show. These tests are run by `make gpu-check`, and skip where torch sees no GPU."""

import copy

import pytest
import torch

from moreh.accelerator.gpus import gpu_uses
from tests.helpers.batches import batch
from tests.helpers.compare import relative_difference, worst_of_names
from tests.helpers.fast_path_cases import MAX_TOKENS, gradients
from utils.training.checkpoint.random_states import random_states, restore_random_states

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="torch sees no GPU"),
]
DEVICE = "cuda"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_fast_path_computes_what_the_models_own_forward_pass_does(family):
    from moreh.options import DEFAULT_OPTIONS
    from moreh.runtime.batch.loss_output import LazyOutput
    from moreh.runtime.engine.fast_path import FastPath
    from tests.helpers.models.tiny_models import build, tiny_config_of

    model = build(tiny_config_of(family, {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}), DEVICE)
    ids, mask, labels = (tensor.to(DEVICE) for tensor in batch(0, model.config.vocab_size))
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}
    torch.set_float32_matmul_precision("highest")
    expected = model(**inputs).loss
    expected.backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    outputs = FastPath(DEFAULT_OPTIONS).call(model, (), inputs, MAX_TOKENS)
    assert isinstance(outputs, LazyOutput)
    outputs.loss.backward()
    assert relative_difference(outputs.loss, expected) < 1e-5
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    assert worst_of_names(gradients(model), expected_gradients, floor=1e-2 * largest) < 1e-4


def test_random_states_of_the_gpu_come_back():
    torch.rand(1, device=DEVICE)
    states = copy.deepcopy(random_states())
    first = torch.rand(4, device=DEVICE)
    restore_random_states(states)
    assert torch.equal(torch.rand(4, device=DEVICE), first)


def test_the_driver_tells_of_memory_in_use():
    kept = torch.ones(2**28, dtype=torch.uint8, device=DEVICE)
    torch.cuda.synchronize()
    assert gpu_uses()[0].memory_used_mib >= 256
    del kept


def test_fused_adam_steps_as_torchs_own():
    from moreh.runtime.kernels.fused_adam import use_fused_kernels

    weights = []
    for fused in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(64, 64, device=DEVICE)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        if fused:
            use_fused_kernels(optimizer)
        for _ in range(3):
            layer(torch.ones(8, 64, device=DEVICE)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(layer.weight.detach())
    assert relative_difference(weights[1], weights[0]) < 1e-5
