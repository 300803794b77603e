"""Faults of data, tokenizers and settings that no message would tell of, each put back: its test has to see it.

Each was found in this project once. A fault is an attribute of the code in another state, and the test of the repair.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml

from tests.helpers.scripts.tiny_tokenizers import sentencepiece_tokenizer
from tests.utils import test_models, test_yaml_values
from tests.utils.data import test_file_formats, test_row_counts
from tests.utils.data.test_row_counts import run_on
from tests.utils.test_models import load
from tests.utils.text import test_decoding, test_encoding, test_prompt_input, test_template
from utils.config import yaml_12
from utils.config.yaml_12 import Loader
from utils.errors import UserError
from utils.text.template import PromptTemplate

__all__ = ["load", "run_on"]  # fixtures of the tests


@dataclass(frozen=True)
class Fault:
    """A state of the code, and a test that passes without it."""

    target: str
    """The dotted name of the attribute."""
    broken: Any
    """What is there instead."""
    test: Callable[..., None]
    """The test that sees it."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the test that are no fixtures."""


def _size_is_ignored(self):
    return self


def _size_and_time(path):
    return (path.stat().st_size, path.stat().st_mtime_ns)


def _bytes_as_they_are(file, label):
    return file.read().decode("utf-8")


FAULTS = {
    "spaces of answers are dropped": Fault(
        "utils.text.decoding._ids_that_decode_to",
        lambda letter, tokenizer: [],
        test_decoding.test_answer_is_decoded_character_for_character,
        {"tokenizer": sentencepiece_tokenizer(), "answer": "    return x\n    y"},
    ),
    "generation waits for the end token of the configuration": Fault(
        "utils.training.model.end_at_trained_token",
        lambda model, tokenizer, info: None,
        test_models.test_generation_stops_at_the_token_that_was_trained,
        {"config_end": 40, "generation_end": 40},
    ),
    "the begin token comes twice": Fault(
        "utils.text.encoding.adds_begin_token",
        lambda tokenizer: False,
        test_encoding.test_begin_token_of_a_template_is_not_added_once_more,
        {"kind": "metaspace"},
    ),
    "the letters of an end token are learned": Fault(
        "utils.text.spelled_tokens.without_end_token",
        lambda response, tokenizer, pattern: (response, None),
        test_encoding.test_response_that_spells_its_end_has_one_end_token,
        {"tokenizer": sentencepiece_tokenizer(), "response": "3</s>", "control_tokens": "text"},
    ),
    "the template shows the response": Fault(
        "utils.config.source_section.template_names",
        lambda template: {"prompt"},
        test_template.test_prompt_that_shows_the_response_is_refused,
        {"settings": {"template": "{prompt}\n{output}", "response_field": "output"}, "message": "names {output}"},
    ),
    "control tokens of a user's text forge a turn": Fault(
        "utils.text.encoding.split_at_spelled",
        lambda prompt, pattern: [(str(prompt), False)],
        test_encoding.test_control_tokens_of_a_field_forge_no_turn,
        {"tokenizer": sentencepiece_tokenizer()},
    ),
    "the last of two values of a name wins": Fault(
        "utils.data.sources.file_readers._object",
        dict,
        test_file_formats.test_name_given_twice_is_refused,
        {"extension": "jsonl"},
    ),
    "the cache is older than its files": Fault(
        "utils.data.sources.states._state",
        _size_and_time,
        test_row_counts.test_file_of_the_same_size_and_time_is_read_anew,
    ),
    "a template of the command line is YAML": Fault(
        "utils.config.yaml_file._override_value",
        lambda keys, text: yaml.load(text, Loader=Loader),
        test_yaml_values.test_template_of_the_command_line_is_what_was_typed,
        {"template": "Translate {prompt} #formal"},
    ),
    "equal rows vanish uncounted": Fault(
        "utils.data.sources.mixing.replace",
        lambda counts, **changes: counts,
        test_row_counts.test_equal_empty_and_unusable_rows_are_counted,
    ),
    "the template is not saved with the model": Fault(
        "utils.text.template._checked",
        lambda template: PromptTemplate("{prompt}", "text"),
        test_template.test_template_is_saved_with_the_model,
    ),
    "a leading zero makes an octal number": Fault(
        "utils.config.yaml_12.Loader.yaml_constructors",
        {**Loader.yaml_constructors, f"{yaml_12._TAG}int": lambda loader, node: int(node.value, 8)},
        test_yaml_values.test_leading_zero_is_no_octal_number,
    ),
    "the size of a vocabulary is ignored": Fault(
        "utils.config.schema.TokenizerSection._check_vocabulary_size.__code__",
        _size_is_ignored.__code__,
        test_yaml_values.test_size_of_a_vocabulary_beside_a_pretrained_tokenizer_is_refused,
    ),
    "a prompt has the marks of its file": Fault(
        "utils.text.prompt_input._decode",
        _bytes_as_they_are,
        test_prompt_input.test_byte_order_mark_and_line_ends_are_no_part_of_a_prompt,
        {"source": "file"},
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, monkeypatch, request):
    fault = FAULTS[name]
    fixtures = [parameter for parameter in inspect.signature(fault.test).parameters if parameter not in fault.arguments]
    values = {fixture: request.getfixturevalue(fixture) for fixture in fixtures}
    monkeypatch.setattr(fault.target, fault.broken)
    with pytest.raises((AssertionError, UserError, pytest.fail.Exception)):
        fault.test(**values, **fault.arguments)
