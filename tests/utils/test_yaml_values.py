"""Values of settings: numbers as YAML 1.2 has them, texts of the command line as they were typed, paths from home."""

import re

import pytest

from utils.config.yaml_file import load_config, save_config
from utils.errors import UserError


@pytest.mark.parametrize("text", ["1_000", "0b11", "1:30", "0o10", "yes"])
def test_number_that_is_not_one_of_yaml_1_2_is_refused(tiny_config, text):
    with pytest.raises(UserError, match=rf"train\.steps: '{text}' is not allowed: input should be a valid integer"):
        load_config(str(tiny_config), [f"train.steps={text}"])


def test_leading_zero_is_no_octal_number(tiny_config):
    text = tiny_config.read_text(encoding="utf-8").replace("steps: 4", "steps: 010")
    tiny_config.write_text(text, encoding="utf-8")
    assert load_config(str(tiny_config), []).train.steps == 10
    assert load_config(str(tiny_config), ["train.steps=012", "train.lr=010"]).train.steps == 12
    assert load_config(str(tiny_config), ["train.seed=0x10", "train.lr=1e-3"]).train.seed == 16


@pytest.mark.parametrize(
    "word", ["yes", "no", "on", "off", "010", "1_000", "1:30", "null", "1e-4", "0x10", "# a", "a: b"]
)
def test_texts_survive_being_saved(tiny_config, tmp_path, word):
    config = load_config(str(tiny_config), [f"data.split='{word}'", "data.files=null", "data.hub=x"])
    assert config.data.split == word
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(str(tmp_path / "saved.yaml"), []) == config


@pytest.mark.parametrize(
    "template",
    [
        "Translate {prompt} #formal",
        "a\n{prompt}",
        "{prompt}!",
        "{prompt}: ",
        "- {prompt}",
        "{prompt}\n\n",
        "'{prompt}' is",
    ],
)
def test_template_of_the_command_line_is_what_was_typed(tiny_config, template):
    assert load_config(str(tiny_config), [f"data.template={template}"]).data.template == template


def test_texts_of_the_command_line_may_be_quoted_null_or_numbers(tiny_config):
    config = load_config(
        str(tiny_config),
        ['data.template="a\\n{prompt}"', "run.name=2024", "model={pretrained: x}", "tokenizer=null", "tokenizer={}"],
    )
    assert (config.data.template, config.run.name) == ("a\n{prompt}", "2024")
    config = load_config(str(tiny_config), ["accelerator.model=2", "data.end_token=null"])
    assert (config.accelerator.model, config.data.end_token) == (2, None)


def test_size_of_a_vocabulary_beside_a_pretrained_tokenizer_is_refused(tiny_config, tmp_path):
    with pytest.raises(
        UserError, match=r"tokenizer: pretrained is 'x', .* vocabulary_size is 300: leave one of them out"
    ):
        load_config(str(tiny_config), ["tokenizer.pretrained=x"])
    with pytest.raises(UserError, match="leave one of them out"):  # what would be the default is given, too
        load_config(str(tiny_config), ["tokenizer={pretrained: x, vocabulary_size: 4096}"])
    config = load_config(str(tiny_config), ["tokenizer={pretrained: x}"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(str(tmp_path / "saved.yaml"), []) == config
    assert load_config(str(tiny_config), ["tokenizer={}"]).tokenizer.entries_to_train() == 4096


def test_paths_begin_at_home(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    overrides = [
        "tokenizer={pretrained: ~/mine}",
        "run.directory=~/x",
        "run.cache_directory=~/c",
        "data.files=[~/pairs.jsonl]",
    ]
    config = load_config(str(tiny_config), [*overrides, "checkpoint.resume=~/x/tiny"])
    assert config.tokenizer.pretrained == str(tmp_path / "mine")
    assert (config.run.directory, config.run.cache_directory) == (str(tmp_path / "x"), str(tmp_path / "c"))
    assert config.data.files == [str(tmp_path / "pairs.jsonl")]
    assert config.checkpoint.resume == str(tmp_path / "x/tiny")
    assert load_config(str(tiny_config), ["model={pretrained: ~/mine}", "tokenizer={}"]).model.pretrained == str(
        tmp_path / "mine"
    )
    assert load_config(str(tiny_config), ["run.directory=~no_such_user/x"]).run.directory == "~no_such_user/x"


def test_saved_settings_do_not_resume(tiny_config, tmp_path):
    config = load_config(str(tiny_config), ["checkpoint.resume=auto"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(str(tmp_path / "saved.yaml"), []).checkpoint.resume is None


def test_pattern_stands_for_the_files_that_match(tiny_config, tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt", "d[1].jsonl"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_text("", encoding="utf-8")

    def files(*names):
        return load_config(str(tiny_config), [f"data.files=[{', '.join(map(repr, names))}]"]).data.files

    directory = f"{tmp_path / 'data'}/"
    assert files(f"{directory}[ab].jsonl") == [f"{directory}a.jsonl", f"{directory}b.jsonl"]
    assert files(f"{tmp_path}/**/*.txt") == [f"{directory}c.txt"]
    assert files(f"{directory}d[1].jsonl") == [f"{directory}d[1].jsonl"]  # a file of that very name
    with pytest.raises(UserError, match=r"there is no file .*/x\*\.jsonl$"):
        files(f"{directory}x*.jsonl")
    with pytest.raises(UserError, match=r"there is no file a,b; write several files in brackets"):
        load_config(str(tiny_config), ["data.files=a,b"])
    with pytest.raises(
        UserError, match=r"data is a directory, and not one of save_to_disk: .* example .*/data/\*\.jsonl"
    ):
        files(f"{tmp_path / 'data'}")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("trian.lr=1", "trian: unknown key; did you mean train?"),
        ("trian.x.y=1", "trian: unknown key; did you mean train?"),
        ("lr=1", "lr: unknown key; did you mean train.lr?"),
        ("pretrained=x", "pretrained: unknown key; did you mean model.pretrained or tokenizer.pretrained?"),
        ("learning_rate=1", "learning_rate: unknown key; did you mean train.lr?"),
        ("train.num_train_epochs=1", "train.num_train_epochs: unknown key; did you mean epochs?"),
        ("train.x=1", "train.x: unknown key. Allowed here: steps"),
    ],
)
def test_unknown_key_has_its_place_and_the_key_that_it_may_stand_for(tiny_config, override, problem):
    with pytest.raises(UserError, match=rf"^command line: {re.escape(problem)}"):
        load_config(str(tiny_config), [override])


PATHS = ("run.directory", "run.cache_directory", "tokenizer.pretrained", "model.pretrained", "data.hub")


@pytest.mark.parametrize("key", [*PATHS, "data.chat_template", "checkpoint.resume"])
@pytest.mark.parametrize("word", ["None", "none", "[a]", "{a: b}"])
def test_words_for_nothing_and_lists_are_no_paths(tiny_config, key, word):
    with pytest.raises(UserError, match=rf"command line: {key}: .* (reads like no path|is not allowed: give one path)"):
        load_config(str(tiny_config), [f"{key}={word}"])


@pytest.mark.parametrize("key", ["run.directory", "run.cache_directory", "run.name", "data.split", "data.template"])
@pytest.mark.parametrize("word", ["null", "Null", "~", " ~ "])
def test_null_is_refused_where_a_key_does_not_allow_it(tiny_config, key, word):
    with pytest.raises(UserError, match=rf"command line: {key}: {word} is not allowed: leave the key out"):
        load_config(str(tiny_config), [f"{key}={word}"])


@pytest.mark.parametrize("word", ["null", "NULL", "~", ""])
def test_null_unsets_a_key_that_allows_it(tiny_config, word):
    resume = load_config(str(tiny_config), ["checkpoint.resume=auto", f"checkpoint.resume={word}"]).checkpoint.resume
    assert resume is None
    assert load_config(str(tiny_config), [f"data.end_token={word}"]).data.end_token is None


@pytest.mark.parametrize("line", ["directory: null", "directory: None", "directory: ~", "directory: ''", "name: None"])
def test_words_for_nothing_in_the_file_are_refused(tiny_config, line):
    text = tiny_config.read_text(encoding="utf-8")
    key = line.partition(":")[0]
    old = next(old for old in text.splitlines() if old.startswith("run:"))
    settings = "{directory: runs, name: tiny}"
    tiny_config.write_text(text.replace(old, "run: " + re.sub(rf"{key}: \w+", line, settings)), encoding="utf-8")
    with pytest.raises(UserError, match=rf"run\.{key}: .*(not allowed|reads like no )"):
        load_config(str(tiny_config), [])


def test_folder_may_have_such_a_name(tiny_config):
    assert load_config(str(tiny_config), ["run.directory=./None"]).run.directory == "./None"
    assert load_config(str(tiny_config), ["run.directory=./[a]"]).run.directory == "./[a]"
    assert load_config(str(tiny_config), ["data.template=[{prompt}]"]).data.template == "[{prompt}]"


def test_escaped_surrogates_are_one_character_and_half_a_pair_is_none(tiny_config):
    """JSON, which is YAML, writes characters beyond 16 bits as two escapes."""
    text = tiny_config.read_text(encoding="utf-8")
    settings = r'max_length: 48, split: "smile \ud83d\ude00", hub: x'
    tiny_config.write_text(text.replace("max_length: 48", settings, 1), encoding="utf-8")
    assert load_config(str(tiny_config), ["data.files=null"]).data.split == "smile \U0001f600"
    for wrong in (r'"\ud83d": 1, max_length: 48', r'max_length: 48, split: "\ude00"'):
        tiny_config.write_text(text.replace("max_length: 48", wrong, 1), encoding="utf-8")
        with pytest.raises(UserError, match="not valid YAML: an escape is half of a surrogate pair"):
            load_config(str(tiny_config), [])
