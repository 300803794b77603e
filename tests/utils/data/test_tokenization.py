"""From pairs to rows of token ids: the tokenizer, the border of prompt and response, and what is cut or dropped."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.helpers.scripts.tiny_runs import encode
from utils.config.schema import DataSection
from utils.data.records import Pair
from utils.data.tokenization import encode_prompts, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x + 1\n", "abc abcabc abab"] * 20, 300)


def encode_texts(tokenizer, *texts, **settings):
    pairs = [Pair(str(index), prompt, response) for index, (prompt, response) in enumerate(texts)]
    return encode(pairs, tokenizer, DataSection(hub="x", **settings))[:2]


def test_rows_are_prompt_response_and_end(tokenizer):
    (row,), counts = encode_texts(tokenizer, ("def f(x):\n", "    return x\n"))
    assert tokenizer.decode(row.input_ids[: row.prompt_length]) == "def f(x):\n"
    assert tokenizer.decode(row.input_ids[row.prompt_length : -1]) == "    return x\n"
    assert row.input_ids[-1] == tokenizer.eos_token_id
    assert counts.kept == 1


def test_labels_are_the_response_and_its_end_or_all(tokenizer):
    texts = ("def f(x):\n", "    return x\n")
    (row,), _ = encode_texts(tokenizer, texts)
    assert row.labels == [-100] * row.prompt_length + row.input_ids[row.prompt_length :]
    assert row.labels[-1] == tokenizer.eos_token_id  # or the model never learns to stop
    (row,), _ = encode_texts(tokenizer, texts, loss_on="all")
    assert row.labels == row.input_ids


def test_border_stays_where_tokens_would_merge(tokenizer):
    """`ab` + `c` is one token when written together; generation sees `ab` alone and must meet the ids of training."""
    joined = tokenizer("abc")["input_ids"]
    separate = tokenizer("ab")["input_ids"] + tokenizer("c")["input_ids"]
    assert joined != separate  # so the mistaken way, tokenizing the whole text, gives other ids
    (row,), _ = encode_texts(tokenizer, ("ab", "c"))
    assert row.input_ids[:-1] == separate
    assert row.input_ids[: row.prompt_length] == encode_prompts(["ab"], tokenizer)[0]


def test_tokenizer_that_puts_a_space_before_every_text_puts_none_before_responses():
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    alphabet = [*map(chr, range(32, 127)), "\n", "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=["<unk>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator(["def f(x):\n    return x + 1\n"] * 3, trainer)
    llama = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    assert llama.decode(llama("A:")["input_ids"] + llama("two")["input_ids"]) == "A: two"  # what has to be avoided
    rows, _ = encode_texts(llama, ("A:", "two"), ("def f(x):\n", "    return x\n"))
    assert [llama.decode(row.input_ids, skip_special_tokens=True) for row in rows] == [
        "A:two",
        "def f(x):\n    return x\n",
    ]


def test_name_of_the_end_token_in_a_response_is_text(tokenizer):
    (row,), _ = encode_texts(tokenizer, ("p", "say <|endoftext|> twice"))
    assert row.input_ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(row.input_ids[row.prompt_length : -1]) == "say <|endoftext|> twice"


@pytest.mark.parametrize(
    ("settings", "kept", "truncated", "too_long", "without_label"),
    [
        ({"max_length": 500}, 3, 0, 0, 0),
        ({"max_length": 12}, 2, 1, 0, 1),  # the third prompt alone fills the row: no label is left
        ({"max_length": 12, "too_long": "drop"}, 1, 0, 2, 0),
        ({"max_length": 12, "loss_on": "all"}, 3, 2, 0, 0),  # then the prompt's tokens are labels
    ],
)
def test_long_rows_and_rows_without_labels_are_counted(tokenizer, settings, kept, truncated, too_long, without_label):
    rows, counts = encode_texts(tokenizer, ("a", "b"), ("a", "z" * 40), ("z" * 40, "b"), **settings)
    # A row that is cut and then dropped for want of a label counts as dropped only.
    assert (counts.kept, counts.truncated, counts.dropped_too_long, counts.dropped_without_label) == (
        kept,
        truncated,
        too_long,
        without_label,
    )
    assert len(rows) == kept
    assert all(len(row.input_ids) == len(row.labels) <= settings["max_length"] for row in rows)


def test_empty_prompt_is_the_token_that_begins_a_text(tokenizer):
    (row,), _ = encode_texts(tokenizer, ("", "abc"))
    assert row.input_ids[0] == tokenizer.bos_token_id
    assert row.prompt_length == 1
    assert tokenizer.decode(row.input_ids[1:-1]) == "abc"


def test_end_of_text_that_a_tokenizer_adds_is_not_in_the_prompt():
    adding = train_tokenizer(["abc"] * 5, 300)
    end = processors.TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    adding._tokenizer.post_processor = end
    assert adding("abc")["input_ids"][-1] == 0
    assert 0 not in encode_prompts(["abc"], adding)[0]
