"""A step asks the device nothing: on a GPU each answer would wait until everything before it is computed.

The models are on the meta device, whose tensors have no numbers. Whatever asks for one raises an error.
"""

import pytest
import torch

from moreh.models.known_computation import KnownComputation
from moreh.options import DEFAULT_OPTIONS
from moreh.runtime.batch.loss_output import LazyOutput
from moreh.runtime.batch.scaling import scale_in_place
from moreh.runtime.engine import model_runner
from moreh.runtime.engine.fast_path import FastPath
from moreh.runtime.kernels.attention import dispatch, varlen
from tests.helpers.fast_path_cases import batch
from tests.helpers.models.tiny_models import build, tiny_config_of

# The meta device has no attention for the heads of some other tiny models.
FAMILIES = ("llama", "gpt_neox", "phi3")
META = torch.device("meta")


@pytest.fixture
def without_data(monkeypatch):
    """Models on the meta device are computed as those on a GPU are."""
    monkeypatch.setattr(KnownComputation, "unknown_reason", lambda self: None)
    # Autocast does not know this device.
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        known = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda kind="cpu", known=known: known("cuda" if kind == "meta" else kind))
    # Rotary embeddings of transformers 5.17 ask these functions, which count as a script's own here.
    monkeypatch.setattr(model_runner, "unsupported_module", lambda root: None)


def test_the_meta_device_knows_no_numbers():
    values = torch.ones(3, device=META)
    for ask in (torch.Tensor.tolist, torch.Tensor.nonzero, lambda tensor: tensor.sum().item(), lambda t: t[t > 0]):
        with pytest.raises((NotImplementedError, RuntimeError)):
            ask(values)


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_asks_the_device_nothing(family, packs, without_data, monkeypatch):
    model = build(tiny_config_of(family, {}))
    inputs = batch(model)
    model.to(META)
    attended = []

    def attend(query, key, value, cu_seqlens, longest, scale):
        attended.append(longest)
        return torch.empty(1, query.shape[2], query.shape[1], value.shape[3], device=META) + query.sum() + value.sum()

    monkeypatch.setattr(varlen, "is_usable", lambda device, dtype: packs)
    monkeypatch.setattr(dispatch, "packed_by_varlen", lambda device: packs)
    monkeypatch.setattr(varlen, "attend", attend)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    path = FastPath(DEFAULT_OPTIONS)
    for _ in range(2):
        outputs = path.call(model, (), inputs, 30)
        assert isinstance(outputs, LazyOutput)
        assert outputs.loss.device == META
        (outputs.loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert bool(attended) == packs


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_gradients_are_scaled_alike_with_and_without_asking(factor):
    gradients = [torch.arange(5.0), torch.full((2, 3), 0.1)]
    expected = [gradient * factor for gradient in gradients]
    scale_in_place(gradients, torch.tensor(factor))
    assert all(map(torch.equal, gradients, expected))
    scale_in_place([torch.empty(4, device=META)], torch.empty((), device=META))
