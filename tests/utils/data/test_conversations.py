"""Conversations of files in the layouts that people have, and the rows that a run makes of them."""

import json

import pytest

from tests.helpers.scripts.tiny_runs import prepare
from train_gpt import make_example, make_pair
from utils.config.schema import Config, DataSection, TokenizerSection
from utils.data.conversations import read_conversation
from utils.data.records import Record, UnusableRow
from utils.data.show_rows import format_rows, print_rows
from utils.data.tokenization import train_tokenizer
from utils.errors import UserError


def read(**fields):
    return read_conversation(Record("chats.jsonl:1", fields), DataSection(hub="x", format="chat"))


def answer(content="a", **fields):
    return {"role": "assistant", "content": content, **fields}


def chats(count):
    return [
        [{"role": "user", "content": f"Name {number}?"}, {"role": "assistant", "content": f"It is {number}."}]
        for number in range(count)
    ]


@pytest.fixture
def chat_config(tmp_path):
    """Settings of a run on a file of conversations, and the function that writes them to it."""
    path = tmp_path / "chats.jsonl"

    def config(rows, **data):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return Config.model_validate(
            {
                "run": {"name": "chat", "cache_directory": str(tmp_path / "cache")},
                "model": {"architecture": {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2}},
                "tokenizer": {"vocabulary_size": 300},
                "data": {"files": [str(path)], "format": "chat", "max_length": 128, **data},
                "train": {"steps": 1, "batch_size": 1},
            }
        )

    return config


def test_both_layouts_give_the_same_messages():
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": ""},
    ]
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]
    assert read(messages=messages).messages == read(conversations=turns).messages == tuple(messages)
    assert read(messages=json.dumps(messages)).messages == tuple(messages)


def test_texts_may_be_in_parts_and_columns_may_have_null():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = {"role": "user", "content": parts, "tool_calls": None, "name": None}
    assert read(messages=[message]).messages == ({"role": "user", "content": "ab"},)
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {}}]}
    assert read(messages=[call]).messages[0]["content"] == ""


def test_calls_have_their_arguments_as_objects_in_each_layout():
    """As templates expect them. OpenAI's messages have the text of an object, ShareGPT's turns a text of it all."""
    function = {"name": "add", "arguments": {"a": "\u00e9"}}
    expected = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    text = {"type": "function", "function": {**function, "arguments": json.dumps(function["arguments"])}}
    for calls in ([text], [{"type": "function", "function": function}]):
        assert read(messages=[{"role": "assistant", "content": None, "tool_calls": calls}]).messages == (expected,)
    for content in (function, [function], {**function, "arguments": json.dumps(function["arguments"])}):
        turn = {"from": "function_call", "value": json.dumps(content)}
        assert read(conversations=[turn]).messages == (expected,)
    plain = [{"name": "say", "arguments": "not JSON"}, {"name": "say", "arguments": "3"}]
    message = {"role": "assistant", "content": "", "tool_calls": plain}
    assert read(messages=[message]).messages[0]["tool_calls"] == plain


def test_field_system_is_the_system_message():
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    read_turns = read(conversations=turns).messages
    assert read(conversations=turns, system="s").messages == ({"role": "system", "content": "s"}, *read_turns)
    assert read(conversations=turns, system="").messages == read_turns
    assert read(conversations=turns, system=None).messages == read_turns
    with_message = [{"from": "system", "value": "s"}, *turns]
    assert read(conversations=with_message, system="s") == read(conversations=with_message)


@pytest.mark.parametrize("is_empty_kept", [False, True])
@pytest.mark.parametrize("loss_on", ["response", "all", "last"])
def test_answers_of_weight_0_and_empty_ones_have_no_labels(chat_config, loss_on, is_empty_kept):
    question = {"role": "user", "content": "Why?"}
    without_labels = [answer("no", weight=0), answer("no", train=False), answer("no", training=False)]
    wanted = [answer("yes", weight=1), answer("yes", train=True), answer("yes", weight=1.0)]
    turns = [message for reply in [answer(" "), *without_labels, *wanted] for message in (question, reply)]
    rows = [{"messages": turns}, *({"messages": chat} for chat in chats(3))]
    kept = {"empty_responses": "keep"} if is_empty_kept else {}
    data = prepare(chat_config(rows, eval_rows=1, loss_on=loss_on, max_length=512, **kept))
    shown = next(text for text in format_rows(list(data.train), data.tokenizer) if "Why?" in text)
    assert shown.count("no") == 3
    label_text = "".join(part.split("\u27e7")[0] for part in shown.split("\u27e6")[1:])
    assert "no" not in label_text
    assert label_text.count("yes<|im_end|>") == (1 if loss_on == "last" else 3)
    empty = label_text.count("assistant\n <|im_end|>") if loss_on == "all" else label_text.count(" <|im_end|>")
    assert empty == (is_empty_kept and loss_on != "last")
    unlearned = 3 if is_empty_kept else 4
    assert f"; turns without labels, since they are empty or say so (weight, train): {unlearned}" in str(
        data.train_counts
    )
    assert "without labels" not in str(data.evaluation_counts)


def test_empty_answer_beside_others_is_refused_where_asked(chat_config):
    turns = [*chats(1)[0], {"role": "user", "content": "And?"}, answer("")]
    with pytest.raises(UserError, match=r"chats\.jsonl:1: the response is empty"):
        prepare(chat_config([{"messages": turns}], empty_responses="refuse"))


@pytest.mark.parametrize(
    ("rows", "data", "problem"),
    [
        ([[answer(" ")]], {}, r"data: no row can be used: 1 read; left out: 1 with an empty response"),
        (
            [[answer(text, weight=0)] for text in "abc"],
            {"eval_rows": 1},
            "no training rows are left of 2: 2 have no label",
        ),
    ],
)
def test_data_without_usable_rows_says_why(chat_config, rows, data, problem):
    with pytest.raises(UserError, match=problem):
        prepare(chat_config([{"messages": messages} for messages in rows], **data))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"prompt": "x"}, "no field 'messages': the fields are 'prompt'"),
        ({"messages": []}, "field 'messages' is empty, not a list of messages"),
        ({"messages": None}, "field 'messages' is null, not a list of messages"),
        ({"messages": [{"role": "user", "content": None}]}, "has null as its content: its fields are role, content"),
        ({"messages": [answer(weight=0.5)]}, "message 1 of 'messages' has the weight 0.5; expected 0 or 1"),
        ({"messages": [answer(train="no")]}, "has the train 'no'; expected true or false"),
        ({"messages": [{"role": "system", "content": "a"}], "system": "b"}, "another text in the field 'system'"),
        ({"messages": [answer()], "system": ["b"]}, "field 'system' is .* not a string"),
        ({"messages": "{"}, "field 'messages' is a string, but not JSON"),
        ({"messages": ["hello"]}, "message 1 of 'messages' is 'hello', not an object with a role and text"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "has the role 'boss'; expected one of system, .*human"),
        ({"messages": [{"role": "user", "text": "x"}]}, "message 1 of 'messages' has no content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "has parts that are not text"),
        ({"messages": [{"role": "user", "content": 3}]}, "field 'content' is 3, not a string"),
        ({"conversations": [{"from": "function_call", "value": "add"}]}, "is a function_call without a call such as"),
        ({"conversations": [{"from": "function_call", "value": "[]"}]}, "is a function_call without a call such as"),
        ({"conversations": [{"from": "human", "value": "x"}], "tools": "{"}, "field 'tools' is a string, but not JSON"),
    ],
)
def test_row_without_a_conversation_is_named(fields, problem):
    with pytest.raises(UnusableRow, match=rf"chats\.jsonl:1.*{problem}"):
        read(**fields)


def test_lines_above_the_rows_are_wrapped(chat_config, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    print_rows(chat_config([{"messages": chat} for chat in chats(5)], eval_rows=1), make_pair, make_example, 1)
    shown = capsys.readouterr()
    assert shown.out.startswith("1 of 4 training rows; labels are in ")
    lines = shown.err.splitlines()
    assert any(line.startswith("  ") for line in lines)
    assert [line for line in lines if len(line) > 60 and len(line.split()) > 1 and "examples/s" not in line] == []


def test_new_tokenizer_has_the_tokens_of_chatml(chat_config):
    data = prepare(chat_config([{"messages": chat} for chat in chats(5)], eval_rows=1))
    assert len(data.train) == 4
    assert data.tokenizer.eos_token == "<|im_end|>"
    (text,) = format_rows([data.train[0]], data.tokenizer)
    location, *lines = text.splitlines()
    assert location.endswith("of them labels")
    assert lines[0] == "<|im_start|>user"
    assert lines[2] == "<|im_start|>assistant"
    assert lines[3].startswith("\u27e6It is ")
    assert lines[3].endswith(".<|im_end|>\u27e7")


def test_equal_conversations_and_those_without_an_answer_are_left_out(chat_config):
    silent = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": " "}]
    lines = []
    config = chat_config([{"messages": chat} for chat in [*chats(3), *chats(3), silent]], eval_rows=1)
    data = prepare(config, lines.append)
    assert len(data.train) + len(data.evaluation) == 3
    assert any("7 read; left out: 3 equal to an earlier one" in line and "1 with an empty" in line for line in lines)


def test_conversation_that_the_template_refuses_ends_the_run_or_is_skipped(chat_config, tmp_path):
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ message.role }}: {{ message.content }}<|endoftext|>{% endfor %}",
        encoding="utf-8",
    )
    with_system = [{"role": "system", "content": "s"}, *chats(1)[0]]
    rows = [{"messages": chat} for chat in [*chats(4), with_system, with_system[:2] + chats(9)[8]]]
    settings = {"eval_rows": 3, "chat_template": str(template)}
    with pytest.raises(
        UserError, match=r"chats\.jsonl:[56]: the chat template refuses .*no system .*data\.unusable=skip"
    ):
        prepare(chat_config(rows, **settings))
    lines = []
    data = prepare(chat_config(rows, unusable="skip", **settings), lines.append)
    skipped = sum(data_counts.unusable for data_counts in (data.train_counts, data.evaluation_counts))
    assert skipped == 2
    assert any("unusable, the first: " in line for line in lines)


def test_chatml_is_a_template_that_can_be_named(chat_config, tmp_path):
    """Of a new tokenizer, and of one without a template, which must have the control tokens."""
    rows = [{"messages": chat} for chat in chats(3)]
    new = prepare(chat_config(rows, eval_rows=1, chat_template="chatml"))
    assert new.tokenizer.decode(new.train[0]["input_ids"]).startswith("<|im_start|>user\nName ")
    new.tokenizer.chat_template = None
    new.tokenizer.save_pretrained(tmp_path / "base")
    config = chat_config(rows, eval_rows=1, chat_template="chatml")
    config = config.model_copy(update={"tokenizer": TokenizerSection(pretrained=str(tmp_path / "base"))})
    base = prepare(config)
    assert base.tokenizer.eos_token == "<|im_end|>"
    assert [row["labels"] for row in base.train] == [row["labels"] for row in new.train]
    train_tokenizer(["no control tokens"] * 3, 300).save_pretrained(tmp_path / "plain")
    config = config.model_copy(update={"tokenizer": TokenizerSection(pretrained=str(tmp_path / "plain"))})
    with pytest.raises(UserError, match="which is not a token of the tokenizer"):
        prepare(config)


def test_other_template_is_other_data(chat_config, tmp_path):
    template = tmp_path / "plain.jinja"
    text = "{% for message in messages %}A{{ message.content }}<|endoftext|>{% endfor %}"
    template.write_text(text, encoding="utf-8")
    config = chat_config([{"messages": chat} for chat in chats(3)], eval_rows=1, chat_template=str(template))
    first = prepare(config)
    template.write_text(text.replace("A", "B"), encoding="utf-8")
    second = prepare(config)
    assert first.tokenizer.decode(first.train[0]["input_ids"])[0] == "A"
    assert second.tokenizer.decode(second.train[0]["input_ids"])[0] == "B"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"loss_on": "last"}, "loss_on is 'last', which needs format: chat"),
        ({"messages_field": "m"}, "messages_field is 'm', which needs format: chat"),
        ({"format": "chat", "template": "Q: {prompt}"}, "template is 'Q: {prompt}', but format is 'chat'"),
        ({"format": "chat", "end_token": "</s>"}, "end_token is '</s>', but format is 'chat'"),
        ({"format": "chat", "chat_template": "none.jinja"}, "there is no file none.jinja: give chatml, or a file"),
        ({"chat_template": "chatml"}, "chat_template is 'chatml', which needs format: chat"),
        ({"format": "chat", "hub": None, "docstrings": ["stdlib"]}, "docstrings gives pairs: give files or hub"),
    ],
)
def test_keys_of_the_other_format_are_refused(settings, problem):
    with pytest.raises(ValueError, match=problem):
        DataSection(**{"hub": "owner/name", **settings})
