"""A tokenizer that is not there, ids with holes, and the end token of the settings."""

import json
import time

import pytest

from tests.helpers.scripts.tiny_tokenizers import chat_tokenizer, save_gpt2, sentencepiece_tokenizer
from utils.data.tokenization import train_tokenizer
from utils.errors import UserError
from utils.text.chat_template import drop_other_chat_template, is_chat_template
from utils.text.tokenizers import load_tokenizer, vocabulary_size

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_directory_with_weights_only_is_named(tmp_path):
    save_gpt2(tmp_path, chat_tokenizer())
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match=r"cannot be loaded: there is none in it, .* tokenizer\.save_pretrained$"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_in_a_directory_below_is_suggested(tmp_path):
    chat_tokenizer().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=rf"there is none in it; did you mean {tmp_path / 'tokenizer'}\?$"):
        load_tokenizer(str(tmp_path))


def test_table_alone_names_what_it_needs(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.model alone needs its library \(pip install sentencepiece"):
        load_tokenizer(str(tmp_path))


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    chat_tokenizer().save_pretrained(tmp_path / "mine")
    assert load_tokenizer("~/mine").eos_token == "</s>"


def test_vocabulary_reaches_to_the_largest_id(tmp_path):
    sentencepiece_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] = 699
    path.write_text(json.dumps(content), encoding="utf-8")
    tokenizer = load_tokenizer(str(tmp_path))
    assert len(tokenizer) < 300
    assert vocabulary_size(tokenizer) == 700


def test_end_token_of_the_settings_is_the_tokenizers(tmp_path):
    chat_tokenizer().save_pretrained(tmp_path / "first")
    tokenizer = load_tokenizer(str(tmp_path / "first"), "<|im_end|>")
    tokenizer.save_pretrained(tmp_path / "second")
    assert load_tokenizer(str(tmp_path / "second")).eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "</s>"
    with pytest.raises(UserError, match=r"data\.end_token: '<\|eot_id\|>' is not a token of the tokenizer of .*'</s>'"):
        load_tokenizer(str(tmp_path / "first"), "<|eot_id|>")


def test_chat_template_is_kept_only_where_training_uses_it():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = CHATML
    same = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    assert is_chat_template(tokenizer, same)
    assert not drop_other_chat_template(tokenizer, same)
    assert tokenizer.chat_template == CHATML
    assert drop_other_chat_template(tokenizer, "{prompt}")
    assert tokenizer.chat_template is None


@pytest.mark.parametrize("text", ["a" * 100_000, " " * 100_000, "b a" + "ab" * 50_000])
def test_long_runs_train_a_tokenizer_in_seconds(text):
    begun = time.monotonic()
    tokenizer = train_tokenizer([text, "some text"], 300)
    assert time.monotonic() - begun < 10  # a minute or more without cutting the run
    assert tokenizer.decode(tokenizer(text[:1000])["input_ids"]) == text[:1000]


def test_tokenizer_of_texts_without_long_runs_is_that_of_the_whole_texts():
    from utils.data import tokenization

    texts = ["def f(x):\n    return x + 1\n" * 20, "abc " * 300, "x" * 256]
    pieces = [piece for text in texts for piece in tokenization._in_pieces(text)]
    assert pieces == texts
    assert "".join(tokenization._in_pieces("ab " + "c" * 1000 + " d")) == "ab " + "c" * 1000 + " d"
