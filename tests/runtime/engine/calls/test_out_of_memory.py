"""A step that does not fit the memory is computed again in smaller micro-batches, with the same loss and gradients."""

import logging
from unittest import mock

import pytest
import torch

from moreh.accelerator.memory.out_of_memory import SimulatedOutOfMemoryError
from moreh.options import DEFAULT_OPTIONS, ParallelOptions
from moreh.runtime.batch import packing
from moreh.runtime.engine import model_runner
from moreh.runtime.engine.fast_path import FastPath
from tests.helpers.fast_path_cases import MAX_TOKENS, batch, differences
from tests.helpers.models.families import make_model

run_forward_backward = model_runner.run_forward_backward


class SmallMemory:
    """A device whose memory is full at the first `failures` attempts, after a part of the batch was computed."""

    def __init__(self, failures, error=torch.OutOfMemoryError):
        self.failures, self.error = failures, error
        self.counts = []

    def compute(self, model, num_micro_batches, hidden_shape):
        self.counts.append(num_micro_batches)
        if len(self.counts) <= self.failures:
            run_forward_backward(model, 1, hidden_shape)
            raise self.error("CUDA out of memory. Tried to allocate 2.00 GiB")
        return run_forward_backward(model, num_micro_batches, hidden_shape)

    def __enter__(self):
        self.patch = mock.patch.object(model_runner, "run_forward_backward", self.compute)
        self.patch.__enter__()
        return self

    def __exit__(self, *error):
        self.patch.__exit__(*error)


@pytest.fixture(autouse=True)
def short_rows(monkeypatch):
    """Packed rows as short as those of tiny batches."""
    monkeypatch.setattr(packing, "LENGTH_MULTIPLE", 1)


@pytest.mark.parametrize("disabled", [(), ("pack_rows",)], ids=["packed", "padded"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_step_is_repeated_with_the_same_loss_and_gradients(family, disabled, caplog):
    model = make_model(family)
    with SmallMemory(failures=1) as memory, caplog.at_level(logging.WARNING, "moreh"):
        errors = differences(model, batch(model), ParallelOptions(disable=disabled))
    assert max(errors) < 1e-9
    assert len(memory.counts) == 2
    assert memory.counts[1] > memory.counts[0]
    assert "Out of memory: this step is computed again" in caplog.text


def test_later_steps_keep_the_smaller_micro_batches():
    model = make_model("llama")
    fast_path = FastPath(DEFAULT_OPTIONS)
    with SmallMemory(failures=1) as memory:
        for _ in range(2):
            fast_path.call(model, (), batch(model), MAX_TOKENS).loss.backward()
    assert len(memory.counts) == 3
    assert memory.counts[2] == memory.counts[1]


def test_second_error_reaches_the_script():
    model = make_model("llama")
    with SmallMemory(failures=2) as memory, pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB"):
        FastPath(DEFAULT_OPTIONS).call(model, (), batch(model), MAX_TOKENS)
    assert len(memory.counts) == 2
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_drawn_again_from_the_same_state():
    model = make_model("gpt2", resid_pdrop=0.5)
    torch.manual_seed(3)
    with SmallMemory(failures=1):
        FastPath(DEFAULT_OPTIONS).call(model, (), batch(model), MAX_TOKENS)
    repeated = torch.get_rng_state()
    torch.manual_seed(3)
    FastPath(DEFAULT_OPTIONS).call(model, (), batch(model), MAX_TOKENS // 2)
    assert torch.equal(torch.get_rng_state(), repeated)


def test_single_row_is_not_tried_again():
    model = make_model("llama")
    with SmallMemory(failures=1) as memory, pytest.raises(torch.OutOfMemoryError):
        FastPath(DEFAULT_OPTIONS).call(model, (), batch(model, rows=4), 1)
    assert len(memory.counts) == 1


def test_simulated_error_reaches_the_script_at_once():
    model = make_model("llama")
    with SmallMemory(1, SimulatedOutOfMemoryError) as memory, pytest.raises(SimulatedOutOfMemoryError):
        FastPath(DEFAULT_OPTIONS).call(model, (), batch(model), MAX_TOKENS)
    assert len(memory.counts) == 1
