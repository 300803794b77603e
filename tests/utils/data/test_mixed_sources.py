"""Several sources with weights: which rows an epoch has, and that none of them is held out."""

import json
from collections import Counter

import numpy as np
import pytest

from tests.helpers.scripts.tiny_runs import prepare
from utils.config.yaml_file import load_config, save_config
from utils.data.sources.mixing import Mix
from utils.errors import UserError


@pytest.fixture
def mix(tiny_config, tmp_path):
    """Prepare a run on files of numbered rows, given as name, number of rows and the keys of the source."""

    def run(sources, *overrides, chat=False):
        listed = []
        for name, count, keys in sources:
            path = tmp_path / f"{name}.jsonl"
            rows = [{"prompt": f"{name} {index}", "response": f"r{index}"} for index in range(count)]
            if chat and keys.get("format") != "pairs":
                rows = [
                    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "Yes."}]}
                    for row in rows
                ]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            listed.append({"files": [str(path)], **keys})
        lines = []
        settings = [f"data.sources={json.dumps(listed)}", "data.eval_rows=null", *overrides]
        config = load_config(str(tiny_config), settings)
        return prepare(config, lines.append), lines, config

    return run


def files_of(rows):
    return Counter(location.rpartition("/")[2].partition(".")[0] for location in rows["location"][:])


def test_weights_repeat_and_leave_out_rows_and_none_is_held_out(mix):
    data, lines, _ = mix([("a", 100, {"weight": 2.5}), ("b", 200, {"weight": 0.25}), ("c", 40, {})])
    times = Counter(data.train["location"][:])
    held_out = files_of(data.evaluation)
    # 100 + 0.25 x 200 + 40 = 190 different rows, of which a tenth is held out, in these proportions.
    assert held_out == {"a": 10, "b": 5, "c": 4}
    assert files_of(data.train) == {"a": 225, "b": 49, "c": 36}  # 2.5 x 90, 0.25 x 195 = 48.75, 36
    assert Counter(count for location, count in times.items() if "/a." in location) == {2: 45, 3: 45}
    assert {count for location, count in times.items() if "/a." not in location} == {1}
    assert times.keys().isdisjoint(data.evaluation["location"][:])
    reports = [line for line in lines if line.startswith("Rows of data.sources.")]
    assert [line.rpartition("; ")[2] for line in reports] == [
        "10 held out, 90 to train on: with weight 2.5, 225 of the epoch's 310 (72.6%)",
        "5 held out, 195 to train on: with weight 0.25, 49 of the epoch's 310 (15.8%)",
        "4 held out, 36 to train on: with weight 1, 36 of the epoch's 310 (11.6%)",
    ]


def test_one_source_of_weight_one_gives_the_rows_of_plain_files(mix, tmp_path, tiny_config):
    mixed, _, config = mix([("a", 60, {})])
    plain = prepare(load_config(str(tiny_config), [f"data.files={tmp_path / 'a.jsonl'}", "data.eval_rows=null"]))
    assert mixed.content == plain.content
    save_config(config, tmp_path / "again.yaml")
    assert load_config(str(tmp_path / "again.yaml"), []) == config


def test_each_source_has_fields_of_its_own_or_those_of_the_section(mix, tmp_path):
    (tmp_path / "d.csv").write_text("q,a\n" + "".join(f"d {i},x{i}\n" for i in range(20)), encoding="utf-8")
    csv = {"files": [str(tmp_path / "d.csv")], "prompt_field": "q", "response_field": "a", "template": "Q: {prompt}"}
    data, _, config = mix([("a", 20, {}), ("none", 1, csv)], "data.template=P: {prompt}")
    assert [source.template for source in config.data.sources] == ["P: {prompt}", "Q: {prompt}"]
    texts = {data.tokenizer.decode(row["input_ids"])[:4] for row in data.train}
    assert texts == {"P: a", "Q: d"}


def test_pairs_become_turns_in_a_mix_of_conversations(mix):
    data, _, _ = mix([("a", 20, {}), ("p", 20, {"format": "pairs", "weight": 3})], "data.format=chat", chat=True)
    texts = [data.tokenizer.decode(row["input_ids"]) for row in data.train]
    assert any(text.startswith("<|im_start|>user\np ") and "<|im_start|>assistant\nr" in text for text in texts)
    assert any(text.startswith("<|im_start|>user\na ") and "assistant\nYes.<|im_end|>" in text for text in texts)
    assert files_of(data.train) == {"a": 18, "p": 54}


def test_rows_equal_to_those_of_an_earlier_source_count_there(mix):
    data, _, _ = mix([("a", 30, {}), ("a", 30, {"weight": 5}), ("b", 30, {})], "data.duplicates=keep")
    assert len({tuple(row) for row in data.train["input_ids"]} & {tuple(r) for r in data.evaluation["input_ids"]}) == 0
    with pytest.raises(UserError, match=r"data\.sources\.1: none of its rows are left to train on: it has 0 such rows"):
        mix([("a", 30, {}), ("a", 30, {})])
    with pytest.raises(UserError, match=r"data\.sources\.1: .* it has 30 such rows, and its weight is 0\.01"):
        mix([("a", 30, {}), ("b", 30, {"weight": 0.01})], "data.eval_rows=3")


def test_weights_change_the_cache_and_the_content(mix):
    contents = [mix([("a", 30, {}), ("b", 30, {"weight": weight})])[0].content["train"] for weight in (1, 2, 2)]
    assert contents[0] != contents[1] == contents[2]


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"weight": 0}, r"command line: data\.sources\.0\.weight: 0 is not allowed"),
        ({"wieght": 1}, r"data\.sources\.0\.wieght: unknown key; did you mean weight\?"),
        (
            {"hub": "x"},
            r"data\.sources\.0: give exactly one of docstrings, summaries, files and hub; given: files, hub",
        ),
        ({"files": ["no.jsonl"]}, r"data\.sources\.0\.files: there is no file no\.jsonl"),
        ({"format": "chat"}, r"data: sources\.0 has format: chat, and the section data has format: pairs"),
    ],
)
def test_wrong_sources_are_refused(mix, keys, error):
    with pytest.raises(UserError, match=error):
        mix([("a", 20, keys)])


def test_held_out_rows_are_shared_exactly():
    random = np.random.default_rng(0)
    for _ in range(200):
        weights = random.choice([0.1, 0.5, 1.0, 3.0], random.integers(1, 6))
        counts = random.integers(1, 500, len(weights))
        eval_rows = int(random.integers(1, max(2, (counts * np.minimum(weights, 1)).sum())))
        shares = Mix(np.zeros(0, np.int64), weights).to_hold_out(counts, eval_rows)
        assert shares.sum() == eval_rows
        assert (shares <= counts).all()
