"""Tied embeddings whose gradient is added to the output layer's by rows, beside a whole forward pass."""

from unittest import mock

import pytest
import torch
from torch import nn

from moreh.options import DEFAULT_OPTIONS, ParallelOptions
from moreh.runtime.kernels.tied_embedding import TiedEmbedding
from tests.helpers.compare import worst
from tests.helpers.fast_path_cases import batch, differences
from tests.helpers.models.families import make_model
from tests.helpers.plain_comparison import compare

pytestmark = pytest.mark.usefixtures("few_label_positions")


def tied(family="llama"):
    model = make_model(family, tie_word_embeddings=True)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return model


def adds_rows(model, options=None):
    """Whether the gradient was added by rows. Loss and gradients are compared as well."""
    with mock.patch.object(TiedEmbedding, "_look_up", autospec=True, side_effect=TiedEmbedding._look_up) as look_up:
        assert worst(differences(model, batch(model), options or DEFAULT_OPTIONS)) < 1e-9
    assert "forward" not in model.get_input_embeddings().__dict__
    return look_up.called


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "bloom"])
def test_families_with_a_plain_embedding_get_their_gradient_by_rows(family):
    model = tied(family)
    assert adds_rows(model) == (type(model.get_input_embeddings()) is nn.Embedding)


def test_padding_gets_no_gradient_as_an_input():
    model = tied()
    embedding = model.get_input_embeddings()
    embedding.padding_idx = int(batch(model)["input_ids"][0, 0])
    assert adds_rows(model)
    with mock.patch.object(TiedEmbedding, "add_gradient", add_gradient_of_padding_too):
        assert differences(model, batch(model))[1] > 1e-6


def add_gradient_of_padding_too(embedding, add_gradient=TiedEmbedding.add_gradient):
    embedding._embedding.padding_idx, padding_idx = None, embedding._embedding.padding_idx
    add_gradient(embedding)
    embedding._embedding.padding_idx = padding_idx


def add_nothing(embedding):
    pass


def add_nan(embedding, add_gradient=TiedEmbedding.add_gradient):
    ids, grad_output = embedding._pending[-1]
    embedding._pending[-1] = ids, grad_output.index_fill(-1, torch.tensor(5), float("nan"))
    add_gradient(embedding)


@pytest.mark.parametrize("broken", [add_nothing, add_nan])
def test_comparison_finds_rows_that_are_not_added_and_nans(broken):
    model = tied()
    with mock.patch.object(TiedEmbedding, "add_gradient", broken):
        loss, gradients = (worst(difference) for difference in differences(model, batch(model)))
    assert loss < 1e-9
    assert gradients > 1e-6


def untied(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def frozen(model):
    model.lm_head.weight.requires_grad_(False)


def with_max_norm(model):
    model.get_input_embeddings().max_norm = 0.5


def with_grad_scaled_by_frequency(model):
    model.get_input_embeddings().scale_grad_by_freq = True


def of_another_class(model):
    class Embedding(nn.Embedding):
        pass

    Embedding.__module__ = "transformers.models.llama.modeling_llama"
    model.get_input_embeddings().__class__ = Embedding


@pytest.mark.parametrize("change", [untied, frozen, with_max_norm, with_grad_scaled_by_frequency, of_another_class])
def test_other_embeddings_are_left_to_autograd(change):
    model = tied()
    change(model)
    if change in (with_max_norm, with_grad_scaled_by_frequency):
        # A batch in micro-batches gives other results than a whole one.
        assert not TiedEmbedding(model)._is_supported()
    else:
        assert not adds_rows(model)


def test_switched_off():
    assert not adds_rows(tied(), ParallelOptions(disable=("sparse_embedding",)))


def test_gradient_of_the_embedding_alone_is_dense_with_zeros():
    """As in a backward pass in which no output layer makes a gradient."""
    model = tied()
    ids = batch(model)["input_ids"]
    embedding = TiedEmbedding(model)
    with embedding.deferred_gradient():
        model.get_input_embeddings()(ids).sum().backward()
    weight = model.get_input_embeddings().weight
    assert weight.grad is None
    embedding.add_gradient()
    assert torch.equal(weight.grad.sum(1) / weight.shape[1], ids.flatten().bincount(minlength=len(weight)).double())


def test_penalty_on_the_embeddings_output_has_its_gradient():
    """A forward hook sees what autograd knows: the model's own forward pass runs."""

    def script(model, call):
        seen = []
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
        loss = call(model).loss
        (loss + seen[0].square().mean()).backward()
        return loss

    difference, took = compare(script, tied)
    assert difference < 1e-9
    assert took == [False]


def test_untied_model_of_the_other_tests_is_left_to_autograd():
    assert not adds_rows(make_model("llama"))
