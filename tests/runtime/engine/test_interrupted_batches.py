"""Errors in the middle of a batch that a script catches: what it has accumulated before stays."""

from unittest import mock

import pytest
import torch

from tests.helpers.fast_path_cases import batch
from tests.helpers.models.families import make_model
from tests.helpers.plain_comparison import compare


def raise_in_the_second_backward_pass(error):
    original, seen = torch.Tensor.backward, []

    def backward(*args, **kwargs):
        seen.append(None)
        original(*args, **kwargs)
        if len(seen) == 2:
            raise error

    return mock.patch.object(torch.Tensor, "backward", backward)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_batch_with_an_unknown_token_loses_nothing_of_the_others(family, tied):
    def script(model, call):
        for bad in (False, True, False):
            inputs = batch(model)
            if bad:
                inputs["input_ids"][6, 0] = 10**6
            try:
                (call(model, **inputs).loss / 3).backward()
            except IndexError:
                assert bad

    difference, took = compare(script, lambda: make_model(family, tie_word_embeddings=tied))
    assert difference < 1e-9
    assert took == [True, False, True]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_error_in_the_middle_of_a_backward_pass_leaves_the_gradients_of_before(error):
    def script(model, call):
        call(model).loss.backward()
        if call.__class__.__name__ == "FastCalls":
            with raise_in_the_second_backward_pass(error), pytest.raises(error):
                call(model)
        call(model).loss.backward()

    difference, took = compare(script, lambda: make_model("llama", tie_word_embeddings=True))
    assert difference < 1e-9
    assert all(took)


def test_parameters_without_earlier_gradients_have_none_after_an_error():
    def script(model, call):
        inputs = batch(model)
        inputs["input_ids"][6, 0] = 10**6
        with pytest.raises(IndexError):
            call(model, **inputs).loss.backward()
        assert not any(parameter.grad is not None for parameter in model.parameters())
        return 1.0

    assert compare(script)[0] == 0.0
