"""Conversations in published chat templates: what the assistant writes is a label, and nothing else is."""

from pathlib import Path

import pytest
from tokenizers import AddedToken

from utils.config.schema import DataSection
from utils.data.conversations import Conversation, encode_conversation
from utils.data.records import UnusableRow
from utils.data.tokenization import train_tokenizer
from utils.text.chat import CHATML, CHATML_TOKENS, ChatError, end_of_turn, prompt_for_answer, render_chat
from utils.text.chat_session import encode_chat_prompt
from utils.text.spelled_tokens import SpelledTokens

TEMPLATES = Path(__file__).parent / "chat_templates"
# The control tokens of each template, and what ends a turn of the assistant.
CONTROL_TOKENS = {
    "chatml": ([*CHATML_TOKENS], "<|im_end|>"),
    "gemma3": (["<bos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    "llama3": (["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "llama3_1": (["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "mistral": (["<s>", "</s>", "[INST]", "[/INST]"], "</s>"),
    "phi4": (["<|im_start|>", "<|im_end|>", "<|im_sep|>"], "<|im_end|>"),
    "qwen3": (["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"], "<|im_end|>"),
    "smollm2": (["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
}
BEGIN_TOKENS = {"<bos>", "<|begin_of_text|>", "<s>"}
WITH_SYSTEM = [name for name in CONTROL_TOKENS if name != "mistral"]

QUESTION = {"role": "user", "content": "How much is two and two?"}
ANSWER = {"role": "assistant", "content": "It is four."}
SECOND_QUESTION = {"role": "user", "content": "And three and three?"}
SECOND_ANSWER = {"role": "assistant", "content": "Six.\n\nThree twice."}
SYSTEM = {"role": "system", "content": "You count."}


def make_tokenizer(name):
    """A byte-level tokenizer with the control tokens and the template of a model."""
    tokens, end = CONTROL_TOKENS[name]
    texts = ["How much is two and two? It is four.\n\nuser assistant system model"] * 3
    tokenizer = train_tokenizer(texts, 300)
    special = [token for token in tokens if "think" not in token and "tool" not in token]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens([AddedToken(token, special=False) for token in tokens if token not in special])
    tokenizer.bos_token = next((token for token in tokens if token in BEGIN_TOKENS), tokenizer.bos_token)
    tokenizer.eos_token = end
    path = TEMPLATES / f"{name}.jinja"
    tokenizer.chat_template = path.read_text(encoding="utf-8") if path.is_file() else CHATML
    return tokenizer


@pytest.fixture(scope="module", params=CONTROL_TOKENS)
def named_tokenizer(request):
    return request.param, make_tokenizer(request.param)


@pytest.fixture(scope="module")
def qwen3():
    return make_tokenizer("qwen3")


@pytest.fixture(scope="module")
def chatml():
    return make_tokenizer("chatml")


def answers_of(messages, tokenizer, tools=None):
    """What the assistant writes in a rendered conversation."""
    chat = render_chat(messages, tokenizer, end_of_turn(tokenizer), tools)
    return [chat.text[first:last] for first, last in chat.answers]


def encode(messages, tokenizer, **settings):
    """The row of a conversation."""
    data = DataSection(hub="x", format="chat", **settings)
    conversation = Conversation("chats.jsonl:1", tuple(messages))
    return encode_conversation(conversation, tokenizer, end_of_turn(tokenizer), data, SpelledTokens(tokenizer, data))


def label_texts(row, tokenizer):
    """The texts of the runs of label tokens in a row."""
    runs, inside = [], False
    for token, label in zip(row.input_ids, row.labels, strict=True):
        if label == -100:
            inside = False
            continue
        assert label == token
        runs += [] if inside else [[]]
        runs[-1].append(token)
        inside = True
    return [tokenizer.decode(run) for run in runs]


def test_end_of_turn_is_found(named_tokenizer):
    name, tokenizer = named_tokenizer
    assert end_of_turn(tokenizer) == CONTROL_TOKENS[name][1]


def test_labels_are_the_answers_with_their_ends_and_nothing_else(named_tokenizer):
    name, tokenizer = named_tokenizer
    end = CONTROL_TOKENS[name][1]
    messages = [QUESTION, ANSWER, SECOND_QUESTION, SECOND_ANSWER]
    thought = "<think>\n\n</think>\n\n" if name == "qwen3" else ""  # which its template puts before the last answer
    expected = [f"It is four.{end}", f"{thought}Six.\n\nThree twice.{end}"]
    assert answers_of(messages, tokenizer) == expected
    row = encode(messages, tokenizer)
    assert label_texts(row, tokenizer) == expected
    assert label_texts(encode(messages, tokenizer, loss_on="last"), tokenizer) == expected[1:]
    everything = encode(messages, tokenizer, loss_on="all")
    assert everything.labels == everything.input_ids == row.input_ids


def test_row_is_what_transformers_makes_of_the_conversation(named_tokenizer):
    _, tokenizer = named_tokenizer
    messages = [QUESTION, ANSWER, SECOND_QUESTION, SECOND_ANSWER]
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    row = encode(messages, tokenizer)
    assert tokenizer.decode(row.input_ids) == tokenizer.decode(whole)
    prompt = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encode_chat_prompt(messages[:3], tokenizer) == prompt
    assert row.input_ids[: row.prompt_length] == prompt  # so generation is given what training has seen


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_system_message_is_no_label(name):
    tokenizer = make_tokenizer(name)
    (answer,) = answers_of([SYSTEM, QUESTION, ANSWER], tokenizer)
    assert answer.removeprefix("<think>\n\n</think>\n\n") == f"It is four.{CONTROL_TOKENS[name][1]}"


def test_empty_answer_is_its_end_alone(named_tokenizer):
    name, tokenizer = named_tokenizer
    messages = [QUESTION, {"role": "assistant", "content": ""}, SECOND_QUESTION, SECOND_ANSWER]
    first, _ = answers_of(messages, tokenizer)
    assert first == CONTROL_TOKENS[name][1]


def test_white_space_around_texts_is_the_templates_choice(named_tokenizer):
    name, tokenizer = named_tokenizer
    messages = [{"role": "user", "content": " Two? "}, {"role": "assistant", "content": "\n Four.\n"}]
    (answer,) = answers_of(messages, tokenizer)
    assert answer.endswith(CONTROL_TOKENS[name][1])
    chat = render_chat(messages, tokenizer, end_of_turn(tokenizer))
    assert chat.text == tokenizer.apply_chat_template(messages, tokenize=False)
    assert [chat.text[first:last] for first, last in chat.fields] == ["Two?", "Four."]


def test_tool_turns_are_no_labels_and_calls_are(qwen3):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 2, "b": 2}}]}
    result = {"role": "tool", "content": "4"}
    first, second, third = answers_of([QUESTION, call, result, ANSWER, SECOND_QUESTION, SECOND_ANSWER], qwen3)
    assert first == '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>'
    assert second == "It is four.<|im_end|>"
    assert third == "<think>\n\n</think>\n\nSix.\n\nThree twice.<|im_end|>"


def test_calls_that_a_template_does_not_show_are_refused(chatml):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    messages = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "4"}]
    with pytest.raises(ChatError, match=r"message 2 calls the function 'add', which the chat template does not show"):
        answers_of([*messages, ANSWER], chatml)
    flat = [QUESTION, {"role": "assistant", "content": "Wait.", "tool_calls": [call["function"]]}]
    with pytest.raises(ChatError, match="message 2 calls"):
        answers_of(flat, chatml)


def test_thoughts_are_labels_where_the_template_shows_them(qwen3):
    """Qwen3's template drops the thoughts of earlier turns, so what comes before an answer differs in the end."""
    thinking = {"role": "assistant", "content": "<think>\nTwo.\n</think>\n\nIt is four."}
    assert answers_of([QUESTION, thinking], qwen3) == ["<think>\nTwo.\n</think>\n\nIt is four.<|im_end|>"]
    first, second = answers_of([QUESTION, thinking, SECOND_QUESTION, thinking], qwen3)
    assert first == "It is four.<|im_end|>"
    assert second == "<think>\nTwo.\n</think>\n\nIt is four.<|im_end|>"


def test_control_tokens_that_messages_spell_are_text(chatml):
    messages = [{"role": "user", "content": "Say <|im_end|> twice."}, ANSWER]
    end = chatml.convert_tokens_to_ids("<|im_end|>")
    row = encode(messages, chatml)
    assert row.input_ids.count(end) == 2  # the ends of the two turns
    assert "Say <|im_end|> twice." in chatml.decode(row.input_ids)
    assert encode(messages, chatml, control_tokens="parse").input_ids.count(end) == 3
    assert encode_chat_prompt(messages[:1], chatml).count(end) == 1


def test_end_that_an_answer_spells_is_not_learned_twice(chatml):
    row = encode([QUESTION, {"role": "assistant", "content": "It is four.<|im_end|>"}], chatml)
    assert label_texts(row, chatml) == ["It is four.<|im_end|>"]


def test_call_that_spells_a_control_token_is_refused(qwen3):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "say", "arguments": {"a": "<|im_end|>"}}]}
    with pytest.raises(UnusableRow, match=r"message 2 calls a function with '<\|im_end\|>', which is a control token"):
        encode([QUESTION, call], qwen3)


def test_template_whose_end_is_no_token_is_refused(chatml):
    plain = train_tokenizer(["How much?"] * 3, 300)
    plain.chat_template = CHATML
    with pytest.raises(ChatError, match=r"with '<\|im_end\|>', which is not a token of the tokenizer"):
        end_of_turn(plain)
    plain.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    with pytest.raises(ChatError, match="ends a turn of the assistant with no token"):
        end_of_turn(plain)
    plain.chat_template = None
    with pytest.raises(
        ChatError, match=r"no chat template: name chatml or a file with a template in data\.chat_template"
    ):
        end_of_turn(plain)


def test_template_that_ends_only_the_last_turn_is_refused(chatml):
    chatml_without_ends = make_tokenizer("chatml")
    chatml_without_ends.chat_template = CHATML.replace("<|im_end|>", "{% if loop.last %}<|im_end|>{% endif %}")
    with pytest.raises(UnusableRow, match=r"chats.jsonl:1: .* ends message 2, of the assistant, without <\|im_end\|>"):
        encode([QUESTION, ANSWER, SECOND_QUESTION, SECOND_ANSWER], chatml_without_ends)


def test_template_that_changes_texts_is_refused(chatml):
    shouting = make_tokenizer("chatml")
    shouting.chat_template = CHATML.replace("message.content", "message.content[:5]")
    with pytest.raises(UnusableRow, match="the chat template changes the texts of the messages"):
        encode([QUESTION, ANSWER], shouting)


def test_messages_that_the_template_refuses_are_named():
    with pytest.raises(UnusableRow, match=r"chats.jsonl:1: the chat template refuses the messages: Conversation roles"):
        encode([QUESTION, SECOND_QUESTION], make_tokenizer("gemma3"))


def test_prompt_marks_the_texts_of_messages(chatml):
    prompt = prompt_for_answer([QUESTION], chatml)
    assert prompt == "<|im_start|>user\nHow much is two and two?<|im_end|>\n<|im_start|>assistant\n"
    assert [prompt[first:last] for first, last in prompt.fields] == [QUESTION["content"]]
