"""Embeddings that are the output layer's weights too: their gradient, row by row, beside that of a whole forward pass."""

from unittest import mock

import pytest
import torch
from torch import nn

from moreh.options import DEFAULT_OPTIONS, ParallelOptions
from moreh.runtime.kernels.tied_embedding import TiedEmbedding
from tests.helpers.families import make_model
from tests.helpers.fast_path_cases import batch, differences

pytestmark = pytest.mark.usefixtures("few_label_positions")


def tied(family="llama"):
    model = make_model(family, tie_word_embeddings=True)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return model


def used(model, options=None):
    """Whether gradients came by rows; they are compared as well."""
    with mock.patch.object(TiedEmbedding, "_look_up", autospec=True, side_effect=TiedEmbedding._look_up) as looked_up:
        assert max(differences(model, batch(model), options or DEFAULT_OPTIONS)) < 1e-9
    assert "forward" not in model.get_input_embeddings().__dict__
    return looked_up.called


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "bloom"])
def test_families(family):
    model = tied(family)
    assert used(model) == (type(model.get_input_embeddings()) is nn.Embedding)


def test_padding_gets_no_gradient_as_an_input():
    model = tied()
    embedding = model.get_input_embeddings()
    embedding.padding_idx = int(batch(model)["input_ids"][0, 0])
    assert used(model)
    with mock.patch.object(TiedEmbedding, "add_rows", without_padding):
        assert differences(model, batch(model))[1] > 1e-6


def without_padding(embedding, add_rows=TiedEmbedding.add_rows):
    embedding._embedding.padding_idx, padding = None, embedding._embedding.padding_idx
    add_rows(embedding)
    embedding._embedding.padding_idx = padding


def test_comparison_finds_rows_that_are_not_added():
    with mock.patch.object(TiedEmbedding, "add_rows"):
        loss, gradients = differences(tied(), batch(tied()))
    assert loss < 1e-9
    assert gradients > 1e-6


def untied(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def frozen(model):
    model.lm_head.weight.requires_grad_(False)


def with_largest_norm(model):
    model.get_input_embeddings().max_norm = 0.5


def by_frequency(model):
    model.get_input_embeddings().scale_grad_by_freq = True


def of_its_own_class(model):
    class Embedding(nn.Embedding):
        pass

    Embedding.__module__ = "transformers.models.llama.modeling_llama"
    model.get_input_embeddings().__class__ = Embedding


@pytest.mark.parametrize("change", [untied, frozen, with_largest_norm, by_frequency, of_its_own_class])
def test_what_is_left_to_torch(change):
    model = tied()
    change(model)
    if change in (with_largest_norm, by_frequency):
        # Whole batches and parts of them give others.
        assert not TiedEmbedding(model)._can_add()
    else:
        assert not used(model)


def test_switched_off():
    assert not used(tied(), ParallelOptions(disable=("sparse_embedding",)))


def test_a_batch_without_labels_has_zeros():
    model = tied()
    given = batch(model)
    embedding = TiedEmbedding(model)
    with embedding.by_rows():
        model.get_input_embeddings()(given["input_ids"]).sum().backward()
    weight = model.get_input_embeddings().weight
    assert weight.grad is None
    embedding.add_rows()
    assert torch.equal(
        weight.grad.sum(1) / weight.shape[1], given["input_ids"].flatten().bincount(minlength=len(weight)).double()
    )


def test_hooks_see_the_embedding():
    model = tied()
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, given, output: seen.append(output.requires_grad))
    assert used(model)
    assert seen
    assert all(seen)


def test_untied_model_of_the_other_tests():
    assert not used(make_model("llama"))
