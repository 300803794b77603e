"""The text of an answer under tokenizers that drop a space at the beginning of what they decode."""

import ast

import pytest
import torch

from tests.helpers.scripts.tiny_tokenizers import chat_tokenizer, sentencepiece_tokenizer
from utils.data.sources.docstring_pairs import read_docstring_pairs
from utils.text.decoding import AnswerStreamer, decode_answer
from utils.text.encoding import encode_continuations, encode_prompts

TOKENIZERS = {
    "metaspace always": lambda: sentencepiece_tokenizer(),
    "metaspace first": lambda: sentencepiece_tokenizer(scheme="first"),
    "metaspace never": lambda: sentencepiece_tokenizer(scheme="never"),
    "normalizer": lambda: sentencepiece_tokenizer("normalizer"),
    "byte level": chat_tokenizer,
}
ANSWERS = ["    return x\n    y", " two", "two", "\n\n  x ", " ", "", "f(x)\n", "  </s>"]


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def streamed(ids, tokenizer):
    pieces = []
    streamer = AnswerStreamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([encode_prompts(["def f(x):\n"], tokenizer)[0]]))
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return pieces


@pytest.mark.parametrize("answer", ANSWERS)
def test_answer_is_decoded_character_for_character(tokenizer, answer):
    (ids,) = encode_continuations([answer], tokenizer)
    ids = [*ids, tokenizer.eos_token_id]
    assert decode_answer(ids, tokenizer) == answer
    assert "".join(streamed(ids, tokenizer)) == answer


def test_first_pieces_are_written_before_the_last_token(tokenizer):
    (ids,) = encode_continuations(["    return x\n    y"], tokenizer)
    assert len([piece for piece in streamed(ids, tokenizer) if piece]) > 2


def test_function_bodies_parse_after_their_way_through_tokens(tokenizer):
    records = [r for r in read_docstring_pairs(["json", "email"]) if r.fields["response"].isascii()][:200]
    assert len(records) > 100
    bodies = [record.fields["response"] for record in records]
    for record, ids in zip(records, encode_continuations(bodies, tokenizer), strict=True):
        body = decode_answer(ids, tokenizer)
        assert body == record.fields["response"]
        ast.parse(record.fields["prompt"] + body)


def test_character_of_several_tokens_is_streamed_when_it_is_complete():
    tokenizer = chat_tokenizer()
    (ids,) = encode_continuations(["añ😀b"], tokenizer)
    pieces = streamed(ids, tokenizer)
    assert "".join(pieces) == "añ😀b"
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(streamed(ids[:-2], tokenizer)) == decode_answer(ids[:-2], tokenizer)  # an incomplete one at the end
