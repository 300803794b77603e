"""Weights that are still in their files: a script finds them as it finds those of a model in memory."""

import contextlib
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from moreh.runtime.sharding.lazy_parameters import file_data
from tests.helpers.models.checkpoint_models import build_model, lazy_loading

# What a script may do with a model before its first batch.
BEFORE_TRAINING = {
    "copies": lambda model: [parameter.detach().clone() for parameter in model.parameters()],
    "state dict": lambda model: {name: value.clone() for name, value in model.state_dict().items()},
    "data": lambda model: [parameter.data + 1 for parameter in model.parameters()],
    "sums": lambda model: [parameter.sum().item() for parameter in model.parameters()],
    "pickled": lambda model: pickle.loads(pickle.dumps(list(model.parameters()))),
    "new parameter": lambda model: nn.Parameter(model.lm_head.weight.data),
    "parameter of a parameter": lambda model: nn.Parameter(model.lm_head.weight),
    "untied": lambda model: setattr(model.lm_head, "weight", nn.Parameter(model.lm_head.weight, requires_grad=False)),
    "vector": lambda model: nn.utils.parameters_to_vector(model.parameters()),
    "initialized": lambda model: nn.init.normal_(model.lm_head.weight),
    "arrays": lambda model: [parameter.detach().double().numpy() for parameter in model.parameters()],
    "bytes": lambda model: [(p.nbytes, p.element_size(), p.itemsize) for p in model.parameters()],
    "footprint": lambda model: model.get_memory_footprint(),
    "dtype": lambda model: torch.empty(0, dtype=model.dtype),
    "rounded": lambda model: model.half().float(),
    "rounded twice": lambda model: model.half().bfloat16().float(),
    "part cast": lambda model: model.lm_head.half(),
    "part cast and back": lambda model: model.half() and model.lm_head.float(),
    "resized": lambda model: model.resize_token_embeddings(40, mean_resizing=False) and torch.manual_seed(0),
    "written": lambda model: [p.data.mul_(1.001) for p in model.parameters()],
    "written in place": lambda model: torch.no_grad()(lambda: model.lm_head.weight.add_(1e-3))(),
    "replaced data": lambda model: [setattr(p, "data", p.data.double()) for p in model.parameters()],
    "frozen": lambda model: [p.requires_grad_(False) for p in model.parameters()],
    "loaded": lambda model: len(model.load_state_dict({"lm_head.weight": torch.randn(31, 16)}, strict=False)),
}


@pytest.mark.parametrize(("saved", "dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("use", BEFORE_TRAINING)
def test_lazy_model_is_used_as_one_in_memory(tmp_path, use, saved, dtype):
    """Results and weights, in the same dtypes."""
    build_model("llama").to(saved).save_pretrained(tmp_path)
    found = []
    for context in (contextlib.nullcontext(), lazy_loading()):
        with context:
            model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
            torch.manual_seed(0)
            result = BEFORE_TRAINING[use](model)
            stored = {file_data(parameter).dtype for parameter in model.parameters()}
            weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        found.append((result, weights, [parameter.requires_grad for parameter in model.parameters()]))
    (expected, *whole), (result, *lazy) = found
    torch.testing.assert_close(lazy, whole, rtol=0, atol=0)
    if not isinstance(expected, nn.Module | torch.Generator):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    if use in ("bytes", "footprint", "dtype", "frozen"):
        assert stored == {saved}
