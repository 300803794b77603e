"""Variable-length attention of packed rows, which GPUs compute: here with a function of the CPU in its place."""

import sys
from types import SimpleNamespace

import pytest
import torch

from moreh.options import ParallelOptions
from moreh.runtime.kernels.attention import varlen
from tests.helpers.fast_path_cases import batch, differences
from tests.helpers.models.families import make_model
from tests.helpers.varlen import VarlenOnCpu, as_one_sequence, one_by_one, with_wrong_scale

CPU = torch.device("cpu")
SHAPE = (torch.bfloat16, 4, 2, 16)
NO_PREFIX = ParallelOptions(disable=("share_prefix",))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "cohere"])
def test_packed_rows_compute_the_same(family, monkeypatch):
    on_cpu = VarlenOnCpu(monkeypatch)
    model = make_model(family)
    assert max(differences(model, batch(model), NO_PREFIX)) < 1e-9
    assert on_cpu.calls >= len(model.base_model._modules)


@pytest.mark.parametrize("fault", [as_one_sequence, with_wrong_scale])
def test_wrong_attention_is_found(fault, monkeypatch):
    VarlenOnCpu(monkeypatch, fault)
    model = make_model("llama")
    assert max(differences(model, batch(model), NO_PREFIX)) > 1e-6


def test_function_without_a_proof_is_not_used(monkeypatch):
    on_cpu = VarlenOnCpu(monkeypatch, as_one_sequence, is_proven=False)
    model = make_model("llama")
    assert max(differences(model, batch(model), NO_PREFIX)) < 1e-9
    assert on_cpu.calls > 0  # those of the proofs
    assert not varlen.is_usable(CPU, torch.bfloat16)
    varlen._REFUSED.clear()


def test_window_shorter_than_a_sequence_is_left_to_torch(monkeypatch):
    on_cpu = VarlenOnCpu(monkeypatch)
    model = make_model("mistral")
    model.config.sliding_window = 3
    assert max(differences(model, batch(model), NO_PREFIX)) < 1e-9
    assert on_cpu.calls == 0


def test_boundaries_of_a_script_are_not_trusted(monkeypatch):
    on_cpu = VarlenOnCpu(monkeypatch)
    row = torch.randn(1, 2, 6, 4)
    boundaries = torch.tensor([0, 2, 6], dtype=torch.int32)
    assert varlen.attend(row, row, row, boundaries, 4, 0.5) is None
    varlen.trust(boundaries)
    assert varlen.attend(row, row, row, boundaries, 4, 0.5).shape == (1, 6, 2, 4)
    assert on_cpu.calls == 1


@pytest.mark.parametrize("function", [as_one_sequence, with_wrong_scale])
def test_proof_finds_a_wrong_function(function):
    assert varlen.proof_error(one_by_one, CPU, *SHAPE) < 1e-2
    assert varlen.proof_error(function, CPU, *SHAPE) > 5e-2


def test_proof_draws_no_random_numbers_of_the_script():
    before = torch.get_rng_state()
    varlen.proof_error(one_by_one, CPU, *SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


def test_function_that_raises_is_refused_with_its_reason(caplog):
    def refuses(*_):
        raise RuntimeError("FlashAttention only supports\nAmpere GPUs or newer.")

    with caplog.at_level("INFO", "moreh"):
        assert not varlen._is_proven(refuses, CPU, *SHAPE)
    assert "FlashAttention only supports Ampere GPUs or newer." in caplog.text
    varlen._REFUSED.clear()


def torch_of_today(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert window_size == (-1, 0)
    assert enable_gqa
    assert cu_q is cu_k
    return one_by_one(query, key, value, cu_q, max_q, scale)


def torch_of_before(query, key, value, cu_q, cu_k, max_q, max_k, is_causal=False, *, scale=None):
    assert is_causal
    assert query.shape == key.shape
    return one_by_one(query, key, value, cu_q, max_q, scale)


def torch_that_is_unknown(query, key, value, cu_q, cu_k, max_q, max_k):
    raise AssertionError


@pytest.mark.parametrize("release", [torch_of_today, torch_of_before])
def test_torchs_function_is_called_as_its_release_wants(release, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=release))
    function = varlen._of_torch()
    assert varlen.proof_error(function, CPU, *SHAPE) < 1e-2


def test_torchs_function_with_other_arguments_is_left_aside(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=torch_that_is_unknown))
    assert varlen._of_torch() is None


def test_flash_attention_is_used_where_it_is_installed(monkeypatch):
    def flash(query, key, value, cu_q, cu_k, max_q, max_k, softmax_scale, causal):
        assert causal
        return one_by_one(query, key, value, cu_q, max_q, softmax_scale)

    assert varlen._of_flash_attention() is None
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash))
    assert varlen.proof_error(varlen._of_flash_attention(), CPU, *SHAPE) < 1e-2


def test_cpus_have_none_and_float32_has_none():
    assert varlen.varlen_function("cpu") is None
    cuda = torch.device("cuda")
    assert not varlen.is_usable(cuda, torch.float32)
