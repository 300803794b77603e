"""What a script changes around a model, and what it gives it: noticed, and left to torch or refused."""

from unittest import mock

import pytest
import torch
from torch.nn import functional
from transformers.loss import loss_utils
from transformers.models.llama import modeling_llama

from moreh.errors import OptionError, PlanError
from moreh.models.compatibility import replaced_loss
from moreh.models.library_functions import LibraryFunctions
from moreh.models.parts import split_into_parts
from moreh.options import DEFAULT_OPTIONS
from moreh.runtime.engine.calls.checks import check_functions, check_modules
from moreh.runtime.engine.fast_path import FastPath
from tests.helpers.fast_path_cases import MAX_TOKENS, batch
from tests.helpers.tensor_cases import whole_model

pytestmark = pytest.mark.usefixtures("few_label_positions")


def llama(**changes):
    return whole_model("llama", changes)


def test_replaced_loss_is_found_behind_another_function():
    model, original = llama(), modeling_llama.apply_rotary_pos_emb
    with mock.patch.object(modeling_llama, "apply_rotary_pos_emb", lambda *args: original(*args)):
        recorded = LibraryFunctions(model)
        assert recorded.replaced.endswith("apply_rotary_pos_emb")
        assert replaced_loss(model) is None
        assert check_functions(model, recorded) is recorded
        with mock.patch.object(loss_utils, "fixed_cross_entropy", return_value=None):
            assert replaced_loss(model) == "transformers.loss.loss_utils.fixed_cross_entropy has been replaced"
            with pytest.raises(OptionError, match="fixed_cross_entropy was replaced after the model was sharded"):
                check_functions(model, recorded)
    assert check_functions(model, recorded).replaced is None


def test_hooks_that_would_see_a_part_of_the_batch_are_refused():
    model = llama()
    check_modules(model)
    handle = model.model.layers[0].mlp.register_full_backward_hook(lambda *_: None)
    with pytest.raises(OptionError, match=r"a backward hook on model\.layers\.0\.mlp would see parts of the batch"):
        check_modules(model)
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    with pytest.raises(OptionError, match="a hook on all modules"):
        check_modules(model)
    handle.remove()
    check_modules(model)


def test_layer_in_two_places_runs_the_models_own_forward():
    model = llama(use_cache=False)
    model.model.layers[1] = model.model.layers[0]
    assert FastPath(DEFAULT_OPTIONS).call(model, (), batch(model), MAX_TOKENS) is NotImplemented
    with pytest.raises(PlanError, match="LlamaForCausalLM has one layer in several places"):
        split_into_parts(model)


def test_ids_and_positions_beyond_the_tables_raise_torchs_own_error():
    """Be it in padding, which is not computed."""
    model, inputs = llama(), batch(llama())
    inputs["labels"][:, -3:] = -100
    assert FastPath(DEFAULT_OPTIONS).call(model, (), inputs, MAX_TOKENS) is not NotImplemented
    inputs["input_ids"][:, -1] = model.config.vocab_size
    assert FastPath(DEFAULT_OPTIONS).call(model, (), inputs, MAX_TOKENS) is NotImplemented
    gpt2 = whole_model("gpt2", {})
    inputs = batch(gpt2)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    padded = {name: functional.pad(inputs[name], (0, gpt2.config.n_positions), value=fill[name]) for name in fill}
    assert FastPath(DEFAULT_OPTIONS).call(gpt2, (), padded, MAX_TOKENS) is NotImplemented
    positions = torch.full_like(inputs["input_ids"], gpt2.config.n_positions)
    with_positions = {**inputs, "position_ids": positions}
    assert FastPath(DEFAULT_OPTIONS).call(gpt2, (), with_positions, MAX_TOKENS) is NotImplemented
