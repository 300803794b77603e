"""The model of a run and its tokenizer: where generation stops, ids with holes, and settings that are nested."""

import pytest
import torch
from transformers import AutoConfig, GenerationConfig, GPT2LMHeadModel

from tests.helpers.scripts.tiny_tokenizers import chat_tokenizer, save_gpt2
from utils.config.yaml_file import load_config
from utils.errors import UserError
from utils.plan_only import plan_request
from utils.text.tokenizers import vocabulary_size
from utils.training.evaluation import generate_sample
from utils.training.model import load_model

GEMMA3_TEXT = (
    "{hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, "
    "head_dim: 16, max_position_embeddings: 64}"
)
GEMMA3_VISION = "{hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 1, image_size: 28}"


@pytest.fixture
def load(tiny_config, tmp_path):
    """Load a pretrained GPT-2 whose files name some end tokens; returns it and the lines of the log."""

    def load_saved(config_end, generation_end, tokenizer=None):
        tokenizer = tokenizer or chat_tokenizer()
        directory = save_gpt2(tmp_path / "saved", tokenizer, eos_token_id=config_end)
        GenerationConfig(eos_token_id=generation_end).save_pretrained(directory)
        lines = []
        config = load_config(str(tiny_config), [f"model={{pretrained: {directory}}}", "tokenizer={}"])
        return load_model(config, tokenizer, lines.append), lines

    return load_saved


def say(model, token):
    """Let a model say one token, whatever it is asked."""
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(1e5 * model.lm_head.weight[token])


@pytest.mark.parametrize(("config_end", "generation_end"), [(40, 40), (2, 40), (40, 2), (40, None), (None, None)])
def test_generation_stops_at_the_token_that_was_trained(load, tmp_path, config_end, generation_end):
    model, lines = load(config_end, generation_end)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 2
    assert bool(lines) == (generation_end != 2)
    assert not lines or lines[0].endswith("it now stops at </s> (2), the end token of the training rows")
    model.save_pretrained(tmp_path / "trained")
    assert GenerationConfig.from_pretrained(tmp_path / "trained").eos_token_id == 2
    saved = GPT2LMHeadModel.from_pretrained(tmp_path / "trained")
    say(saved, 2)
    assert generate_sample(saved, [60, 61], chat_tokenizer(), 20) == ""
    assert saved.generate(input_ids=torch.tensor([[60, 61]]), max_new_tokens=20).shape[1] == 3


def test_other_control_tokens_still_end_an_answer(load):
    model, lines = load(4, [4, 40])
    assert model.generation_config.eos_token_id == [2, 4]
    assert "stopped at <|im_end|> (4)" in lines[0]
    model, lines = load(2, [4, 2])
    assert (model.generation_config.eos_token_id, lines) == ([4, 2], [])


def test_new_model_has_an_embedding_for_the_largest_id(tiny_config):
    tokenizer = chat_tokenizer()
    tokenizer.get_vocab = lambda: {"a": 0, "b": 699}
    config = load_config(str(tiny_config), [])
    assert load_model(config, tokenizer).get_input_embeddings().num_embeddings == 700
    config = load_config(str(tiny_config), ["model.architecture.vocab_size=500"])
    with pytest.raises(UserError, match="vocabulary has 500 entries, fewer than the tokenizer's 700"):
        load_model(config, tokenizer)


def gemma3(tiny_config, text=GEMMA3_TEXT):
    architecture = f"{{model_type: gemma3, text_config: {text}, vision_config: {GEMMA3_VISION}}}"
    return load_config(str(tiny_config), [f"model={{architecture: {architecture}}}"])


def test_model_with_nested_text_settings_gets_those_of_the_tokenizer(tiny_config):
    tokenizer = chat_tokenizer()
    model = load_model(gemma3(tiny_config), tokenizer)
    text = model.config.get_text_config()
    assert (text.vocab_size, text.eos_token_id, text.pad_token_id) == (vocabulary_size(tokenizer), 2, 2)
    assert model.get_input_embeddings().num_embeddings == text.vocab_size
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [("max_position_embeddings: 16", "the model has 16 positions"), ("vocab_size: 7", "vocabulary has 7 entries")],
)
def test_nested_text_settings_are_checked(tiny_config, change, message):
    text = GEMMA3_TEXT.replace("max_position_embeddings: 64", change)
    with pytest.raises(UserError, match=message):
        load_model(gemma3(tiny_config, text), chat_tokenizer())


def test_pretrained_model_with_nested_text_settings_is_loaded(tiny_config, tmp_path):
    load_model(gemma3(tiny_config), chat_tokenizer()).save_pretrained(tmp_path / "gemma3")
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "gemma3"), "vocab_size")
    config = load_config(str(tiny_config), [f"model={{pretrained: {tmp_path / 'gemma3'}}}", "tokenizer={}"])
    assert load_model(config, chat_tokenizer()).config.get_text_config().vocab_size < 300


def test_plan_of_a_new_model_has_the_vocabulary_of_its_tokenizer(tiny_config):
    assert plan_request(gemma3(tiny_config)).training.architecture.vocabulary == 300
    text = GEMMA3_TEXT.replace("{", "{vocab_size: 500, ", 1)
    assert plan_request(gemma3(tiny_config, text)).training.architecture.vocabulary == 500
