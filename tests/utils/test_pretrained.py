"""A pretrained model is loaded as a whole or refused: its config.json has to be that of its weights."""

import json

import pytest
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from tests.helpers.scripts.tiny_tokenizers import chat_tokenizer
from utils.config.yaml_file import load_config
from utils.errors import UserError
from utils.training.model import load_model
from utils.training.pretrained import load_pretrained

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 64}


@pytest.fixture
def saved(tmp_path):
    """A function that saves a tiny model with some keys of its config.json changed; returns its directory."""

    def save(family, **changes):
        if family == "gpt2":
            config = GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0)
            GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
        else:
            LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **SIZES)).save_pretrained(tmp_path / "model")
        path = tmp_path / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
        return str(tmp_path / "model")

    return save


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {"n_layer": 2}, "transformer.h.2.attn.c_attn.weight is in its files, and not in a model of"),
        ("gpt2", {"n_layer": 0}, "transformer.h.0.attn.c_attn.weight is in its files"),
        ("gpt2", {"n_layer": -3}, "transformer.h.0.attn.c_attn.weight is in its files"),
        ("gpt2", {"n_layer": 4}, "transformer.h.3.attn.c_attn.bias is not in its files"),
        ("gpt2", {"n_embd": 16}, "is [32] in its files, but [16] by its configuration"),
        ("gpt2", {"n_layer": True}, "expected int, got bool"),
        ("gpt2", {"model_type": "llama"}, "it is of 6,476,533,760 parameters, and its files hold"),
        ("llama", {"num_hidden_layers": 2}, "model.layers.2.input_layernorm.weight is in its files"),
        ("llama", {"attention_bias": True}, "model.layers.0.self_attn.k_proj.bias is not in its files"),
        ("llama", {"num_key_value_heads": 0}, "cannot be loaded"),
        ("llama", {"max_position_embeddings": 0}, "max_position_embeddings is 0, and a model needs"),
        ("llama", {"hidden_act": "no"}, "KeyError: 'no'"),
        ("llama", {"model_type": "no", "auto_map": {"AutoConfig": "a.B"}}, "it needs code of its own, which is"),
    ],
)  # fmt: skip
def test_configuration_of_another_model_is_refused_in_one_line(saved, capsys, family, changes, message):
    """Without the table that transformers prints, and before missing weights of a large model fill the memory."""
    directory = saved(family, **changes)
    logging.disable_progress_bar()
    with pytest.raises(UserError) as caught:
        load_pretrained(directory, "the model")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "LOAD REPORT" not in "".join(capsys.readouterr())


def test_buffers_that_older_versions_saved_are_left_out(saved):
    directory = saved("gpt2")
    model = load_pretrained(directory, "the model")
    assert model.num_parameters() == GPT2LMHeadModel(AutoConfig.from_pretrained(directory)).num_parameters()
    state = {**model.state_dict(), "transformer.h.0.attn.masked_bias": model.transformer.ln_f.bias.clone()}
    state = {name: tensor.clone() for name, tensor in state.items() if name != "lm_head.weight"}
    model.save_pretrained(directory, state_dict=state)
    assert load_pretrained(directory, "the model").num_parameters() == model.num_parameters()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.architecture.n_inner=0", "c_fc.weight would have no values"),
        ("model.architecture.resid_pdrop=.nan", "resid_pdrop: nan is not allowed"),
        ("model.architecture={model_type: bert, num_hidden_layers: 1}", "'bert' sees the tokens that it is to predict"),
    ],
)
def test_new_model_that_cannot_learn_is_refused(tiny_config, override, message):
    with pytest.raises(UserError, match=message):
        load_model(load_config(str(tiny_config), [override]), chat_tokenizer())


@pytest.mark.parametrize("size", ["n_layer", "n_head", "n_embd", "n_positions", "vocab_size"])
@pytest.mark.parametrize("value", [0, -3])
def test_new_model_of_no_layers_is_refused(tiny_config, size, value):
    config = load_config(str(tiny_config), [f"model.architecture.{size}={value}"])
    with pytest.raises(UserError, match=r"model\.architecture: "):
        load_model(config, chat_tokenizer())


@pytest.mark.parametrize("name", ["", "model"])
def test_run_that_has_not_finished_is_named(tmp_path, name):
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("run: {name: mine}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"the run .*mine has no model yet, .*: continue it with --resume auto"):
        load_pretrained(str(run / name), "the checkpoint")
    (run / "model").mkdir()
    with pytest.raises(UserError, match="there is no model in"):
        load_pretrained(str(run / name), "the checkpoint")
