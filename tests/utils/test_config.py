"""The declarations of the settings: their documentation, the options of the line, and the keys of an architecture."""

import re

import pytest
import yaml

from moreh.models.families.registry import planned_families
from moreh.options import OPTIMIZATIONS, ParallelOptions
from utils.config import architecture_keys
from utils.config.markdown import settings_help, settings_markdown
from utils.config.schema import Config
from utils.config.yaml_file import load_config
from utils.errors import UserError


def sections(model=Config, path=()):
    """Each section with the path of its name, such as ("accelerator", "advanced_parallelization")."""
    for name, field in model.model_fields.items():
        for branch in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if hasattr(branch, "model_fields"):
                yield (*path, name), branch
                yield from sections(branch, (*path, name))


def test_every_key_is_documented_with_its_default():
    page = settings_markdown()
    keys = [(path, name, field) for path, section in sections() for name, field in section.model_fields.items()]
    assert len(keys) >= 50
    for path, name, field in keys:
        assert field.description, (path, name)
        item = re.search(rf"^- \*\*`{'.'.join((*path, name))}`\*\*: .*; (required|default .*)\.$", page, re.M)
        assert item, (path, name)
        assert (item[1] == "required") == field.is_required()
    for name, description in OPTIMIZATIONS.items():
        assert f"- `{name}`: {description[:40]}" in page


def test_page_of_the_settings_has_short_lines_with_one_sentence_each():
    for line in settings_markdown().splitlines():
        assert len(line) <= 120
        assert not re.search(r"[a-z)*][.?!] +[A-Z`]", re.sub(r"`[^`]*`", "code", line)), line


def test_example_on_the_page_of_the_settings_can_be_loaded(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", settings_markdown(), re.S)
    path = tmp_path / "shortest.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_config(str(path), []).train.steps == 100
    required = {name for name, field in Config.model_fields.items() if field.is_required()}
    assert yaml.safe_load(text).keys() == required


def test_line_gets_only_the_options_that_are_changed(tiny_config):
    def options(text):
        return load_config(str(tiny_config), [f"accelerator.advanced_parallelization={text}"]).accelerator.options()

    assert options("{}") == {}
    assert options("null") == {}
    assert options("{mixed_precision: true, num_stages: auto}") == {}
    changed = options("{num_stages: 2, disable: [pack_rows]}")
    assert changed == {"num_stages": 2, "disable": ["pack_rows"]}
    assert changed.keys() <= ParallelOptions.__dataclass_fields__.keys()


@pytest.mark.parametrize("family", sorted(planned_families()))
def test_keys_read_from_the_sources_are_keys_that_transformers_knows(family):
    from transformers import CONFIG_MAPPING

    declared = architecture_keys._declared_keys(family)
    if not declared:
        assert family not in ("gpt2", "llama"), "the sources of transformers have another form: each plan imports torch"
        pytest.skip("the configuration of this family is found by importing transformers")
    known = set(CONFIG_MAPPING[family]().to_dict()) | set(CONFIG_MAPPING[family].attribute_map)
    assert declared <= known


def test_one_name_on_the_command_line_is_a_list_of_one(tiny_config, tmp_path):
    other = tmp_path / "other.jsonl"
    other.touch()
    assert load_config(str(tiny_config), [f"data.files={other}"]).data.files == [str(other)]
    assert load_config(str(tiny_config), ["data.docstrings=stdlib"]).data.docstrings == ["stdlib"]


@pytest.mark.parametrize(
    ("override", "section", "replaced"),
    [
        ("data.hub=some/data", "data", "files"),
        ("data.docstrings=[stdlib]", "data", "files"),
        ("train.epochs=2", "train", "steps"),
        ("model.pretrained=some/model", "model", "architecture"),
    ],
)
def test_one_of_several_on_the_command_line_takes_the_place_of_the_files(tiny_config, override, section, replaced):
    overrides = [override, "tokenizer={}"] if section == "model" else [override]
    assert getattr(getattr(load_config(str(tiny_config), overrides), section), replaced) is None


def test_two_of_several_on_the_command_line_are_refused(tiny_config):
    with pytest.raises(UserError, match="give exactly one of steps and epochs"):
        load_config(str(tiny_config), ["train.steps=3", "train.epochs=2"])


def test_help_has_every_key():
    text = settings_help(80)
    for name, section in Config.model_fields.items():
        for key in getattr(section.annotation, "model_fields", {}):
            assert f"\n  {name}.{key}: " in text
    assert max(map(len, text.splitlines())) <= 80
