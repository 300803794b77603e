"""Every row of a source is accounted for: what is left out, what is held out, and a cache as new as its files."""

import json
import os
import re
from pathlib import Path

import pytest

from tests.helpers.scripts.tiny_runs import prepare
from utils.config.yaml_file import load_config
from utils.errors import UserError


@pytest.fixture
def run_on(tiny_config, tmp_path):
    """Prepare the data of a run on some rows; returns the data and the lines of the log."""

    def run(rows, *overrides):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        lines = []
        data = prepare(load_config(str(tiny_config), [f"data.files=[{path}]", *overrides]), lines.append)
        return data, lines

    return run


def rows(count, response="r"):
    return [{"prompt": f"p{index}", "response": f"{response}{index}"} for index in range(count)]


def test_equal_empty_and_unusable_rows_are_counted(run_on):
    given = rows(50) + rows(68 - 50) + [{"prompt": f"e{i}", "response": ""} for i in range(3)] + [{"prompt": "n"}]
    data, lines = run_on(given, "data.unusable=skip")
    (line,) = [line for line in lines if line.startswith("Rows of the data: ")]
    assert line.startswith(
        "Rows of the data: 72 read; left out: 18 equal to an earlier one (data.duplicates); 3 with an "
    )
    assert re.search(r"1 unusable \(data\.unusable\), the first: .*rows\.jsonl:72: no field 'response'", line)
    assert len(data.train) + len(data.evaluation) == 72 - 18 - 3 - 1
    _, again = run_on(given, "data.unusable=skip")
    assert line in again  # from the cache, too


def test_all_rows_are_kept_where_the_settings_say_so(run_on):
    given = rows(20) * 3 + [{"prompt": f"e{i}", "response": ""} for i in range(3)]
    data, _ = run_on(given, "data.duplicates=keep", "data.empty_responses=keep", "data.eval_rows=8")
    assert len(data.train) + len(data.evaluation) == 63
    assert 8 <= len(data.evaluation) <= 10
    trained = {tuple(row["input_ids"]) for row in data.train}
    assert not any(tuple(row["input_ids"]) in trained for row in data.evaluation)


def test_rows_that_cannot_be_used_end_the_run_unless_they_are_to_be_skipped(run_on):
    with pytest.raises(UserError, match=r"rows\.jsonl:21: field 'prompt' is empty, .*data\.unusable=skip leaves"):
        run_on([*rows(20), {"prompt": None, "response": "r"}])
    with pytest.raises(UserError, match=r"rows\.jsonl:21: the response is empty \(data\.empty_responses=drop"):
        run_on([*rows(20), {"prompt": "p", "response": ""}], "data.empty_responses=refuse")


@pytest.mark.parametrize(("count", "held_out"), [(250, 25), (9, 1), (2100, 200)])
def test_held_out_share_is_sensible_for_small_data(run_on, count, held_out):
    data, lines = run_on(rows(count), "data.eval_rows=null", "data.max_length=20", "tokenizer.vocabulary_size=300")
    assert (len(data.evaluation), len(data.train)) == (held_out, count - held_out)
    assert any(re.match(r"Each epoch drops \d+ training rows", line) for line in lines) == bool((count - held_out) % 8)


def test_rows_of_named_files_are_held_out_and_not_trained_on(run_on, tmp_path):
    given = [*rows(13), {"prompt": "e", "response": ""}, *rows(2)]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    files = f"data.eval_files={tmp_path / 'held_out.jsonl'}"
    data, lines = run_on(rows(40), files, "data.eval_rows=null")
    held_out = data.evaluation["location"][:]
    assert [Path(location).name for location in held_out] == [f"held_out.jsonl:{line}" for line in range(1, 14)]
    assert len(data.train) == 40 - 13
    assert any(line.startswith("Rows of the data: 40 read; left out: 13 equal to an earlier one") for line in lines)
    (line,) = [line for line in lines if line.startswith("Rows of data.eval_files: ")]
    assert line.startswith(
        "Rows of data.eval_files: 16 read; left out: 2 equal to an earlier one (data.duplicates); 1 with"
    )
    with pytest.raises(UserError, match=r"eval_rows is 8, but all rows of eval_files are held out"):
        run_on(rows(40), files)


def test_one_pair_cannot_be_split(run_on):
    with pytest.raises(UserError, match=r"data\.eval_rows: 1 rows are requested, but the data has only 1"):
        run_on(rows(1), "data.eval_rows=null")


def cache_line(config):
    lines = []
    prepare(config, lines.append)
    return next(line for line in lines if line.startswith("Tokenized data: "))


def test_file_of_the_same_size_and_time_is_read_anew(tiny_config):
    config = load_config(str(tiny_config), [])
    (path,) = map(Path, config.data.files)
    before, status = cache_line(config), path.stat()
    path.write_text(path.read_text(encoding="utf-8").replace("add_", "sub_"), encoding="utf-8")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert cache_line(config) != before


@pytest.mark.parametrize("source", ["hub", "files"])
def test_directory_whose_file_changed_is_read_anew(tiny_config, tmp_path, tiny_rows, source):
    import datasets

    directory = tmp_path / "mine"
    if source == "files":
        datasets.Dataset.from_list(tiny_rows).save_to_disk(str(directory))
        config = load_config(str(tiny_config), [f"data.files=[{directory}]"])
    else:
        directory.mkdir()
        (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows), encoding="utf-8")
        config = load_config(str(tiny_config), ["data.files=null", f"data.hub={directory}"])
    before = cache_line(config)
    assert cache_line(config) == before
    fewer = tiny_rows[:-1]
    if source == "files":
        datasets.Dataset.from_list(fewer).save_to_disk(str(directory))
    else:
        (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fewer), encoding="utf-8")
    assert cache_line(config) != before
    assert len(prepare(config).train) == 31


def test_dataset_of_the_hub_is_known_by_its_version(tiny_config, tiny_rows, monkeypatch):
    class Rows(list):
        cache_files = ({"filename": "first/train.arrow"},)

    config = load_config(str(tiny_config), ["data.files=null", "data.hub=some/data"])
    monkeypatch.setattr("datasets.load_dataset", lambda *names, split: Rows(tiny_rows))
    before = cache_line(config)
    assert cache_line(config) == before
    monkeypatch.setattr(Rows, "cache_files", ({"filename": "second/train.arrow"},))
    assert cache_line(config) != before
