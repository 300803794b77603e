"""The template of a prompt: fields of any name, what is saved with a model, and what is put to a question."""

import pytest

from utils.config.schema import DataSection
from utils.errors import UserError
from utils.text.template import PromptTemplate, fill_template, load_template, save_template


def test_fields_may_have_any_name():
    filled = fill_template("{prompt}: {my field}/{a.b}{{x}}", {"prompt": "p", "my field": "1", "a.b": "{2}"})
    assert filled == "p: 1/{2}{x}"
    assert [filled[first:last] for first, last in filled.fields] == ["p", "1", "{2}"]


def test_template_is_saved_with_the_model(tmp_path):
    save_template(DataSection(hub="x", template="Q: {prompt} {input}\nA:", control_tokens="parse"), tmp_path)
    loaded = load_template(str(tmp_path))
    assert loaded == PromptTemplate("Q: {prompt} {input}\nA:", "parse")
    assert loaded.fill("two", {}) == "Q: two \nA:"
    assert loaded.fill("two", {"input": "three"}) == "Q: two three\nA:"
    with pytest.raises(UserError, match="--field other: the model's template has no such field; it has input"):
        loaded.fill("two", {"other": "x"})
    assert load_template(str(tmp_path / "none")) is None


def test_damaged_file_of_a_template_is_named(tmp_path):
    (tmp_path / "prompt_template.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"prompt_template\.json: not the template of a prompt: .*--raw"):
        load_template(str(tmp_path))


def test_prompt_in_the_template_is_recognized():
    template = PromptTemplate("Summarize:\n{prompt}\nSummary:\n", "text")
    assert template.is_applied_to("Summarize:\nx\nSummary:\n")
    assert not template.is_applied_to("x")
    assert not PromptTemplate("{prompt}", "text").is_applied_to("x")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"template": "{prompt}\n{output}", "response_field": "output"},
            "the template names {output}, which is the resp",
        ),
        ({"prompt_field": "text", "response_field": "text"}, "prompt_field and response_field are both 'text'"),
    ],
)
def test_prompt_that_shows_the_response_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataSection(hub="x", **settings)


def test_response_field_named_prompt_is_no_response_in_the_template():
    assert DataSection(hub="x", prompt_field="question", response_field="prompt").template == "{prompt}"
