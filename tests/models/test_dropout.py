"""Which configurations of transformers mean dropout, whatever their family calls it."""

import pytest
from torch import nn
from transformers import AutoConfig

from moreh.models.dropout import draws_random_numbers, has_dropout


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("gpt2", "resid_pdrop"),
        ("llama", "attention_dropout"),
        ("biogpt", "hidden_dropout_prob"),
        ("biogpt", "activation_dropout"),
        ("bert", "attention_probs_dropout_prob"),
        ("xglm", "activation_dropout"),
    ],
)
def test_dropout_of_a_configuration_is_found(family, key):
    config = AutoConfig.for_model(family)
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    layers = nn.Linear(2, 2)
    assert not has_dropout(config, layers)
    setattr(config, key, 0.1)
    assert has_dropout(config, layers)
    assert draws_random_numbers(config, layers)
    assert not draws_random_numbers(config, layers.eval())


def test_dropout_of_heads_that_no_language_model_has_does_not_count():
    config = AutoConfig.for_model("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    assert config.summary_first_dropout > 0
    assert not has_dropout(config, nn.Linear(2, 2))


@pytest.mark.parametrize("key", ["layerdrop", "drop_path_rate"])
def test_left_out_layers_are_random_without_dropout(key):
    config = AutoConfig.for_model("llama", **{key: 0.1})
    assert not has_dropout(config, nn.Linear(2, 2))
    assert draws_random_numbers(config, nn.Linear(2, 2))
