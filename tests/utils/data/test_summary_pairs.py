"""Pairs of a docstring's text and its first line: which docstrings give one, and that no two pairs share text."""

import re
from collections import Counter

import pytest

from tests.helpers.scripts.tiny_runs import prepare, texts_of
from utils.config.schema import DataSection
from utils.config.yaml_file import load_config
from utils.data.sources.summary_pairs import PASSAGE_WORDS, read_summary_pairs
from utils.errors import UserError

TEMPLATE = "Summarize the following:\n{prompt}\nSummary:\n"
THINGS = ["apples", "bread", "cheese", "dates", "eggs", "figs", "grapes", "honey", "ice", "jam"]


def body(word):
    """A sentence whose words all contain one word, so that it shares no passage with the body of another word."""
    return "It is about " + ", ".join(f"{word}{item}" for item in THINGS) + f" and not about {word}nothing at all."


def texts_of_records(records):
    return [(record.fields["prompt"], record.fields["response"]) for record in records]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write the sources of a package that cannot be imported; returns its pairs."""
    directory = tmp_path / "some_package"
    (directory / "tests").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)

    def write(*docstrings, tests=""):
        functions = "".join(f"def f{number}():\n    r'''{text}'''\n\n" for number, text in enumerate(docstrings))
        (directory / "__init__.py").write_text(f"{functions}\nraise SystemExit('imported')\n", encoding="utf-8")
        (directory / "tests" / "test_it.py").write_text(tests, encoding="utf-8")
        return texts_of_records(read_summary_pairs(["some_package"]))

    return write


def test_modules_classes_and_functions_give_pairs(tmp_path, monkeypatch):
    package = tmp_path / "some_package"
    package.mkdir()
    source = (
        f'"""What the module is.\n\n{body("m")}\n"""\n'
        "class A:\n"
        f'    """\n    What the class is.\n\n    {body("c")}\n        Indented.\n    """\n'
        "    if True:\n"
        f'        async def f(self):\n            """Say hello to all.\n\n            {body("f")}\n            """\n'
        f'            def inner():\n                """Inside of another one.\n\n                {body("i")}"""\n'
    )
    (package / "__init__.py").write_text(source, encoding="utf-8")
    (package / "broken.py").write_text("def f(:", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    records = list(read_summary_pairs(["some_package"]))
    assert texts_of_records(records) == [
        (body("m"), "What the module is."),
        (body("c") + "\n    Indented.", "What the class is."),
        (body("f"), "Say hello to all."),
        (body("i"), "Inside of another one."),
    ]
    assert [record.location.rpartition(":")[2] for record in records] == ["1", "6", "14", "19"]


NO_PAIR = {
    "one line": "Say hello to all.",
    "no period": f"Say hello to all\n\n{body('a')}",
    "a summary of two lines": f"Say hello\nto all.\n\n{body('a')}",
    "a short text": "Say hello to all.\n\nBriefly.",
    "a short summary": f"Say hello.\n\n{body('a')}",
    # The raw string ends, an escape sequence follows, and another raw string begins: it is all one docstring.
    "half of a character": f"Say hello to all.\n\n{body('a')}''' '\\ud800' r'''",
}


@pytest.mark.parametrize("case", NO_PAIR)
def test_docstring_gives_no_pair_when_it_has(package, case):
    good = f"What is good is kept.\n\n{body('good')}"
    assert package(NO_PAIR[case], good) == [(body("good"), "What is good is kept.")]


SAME = {
    "the same": f"Say hello to all.\n\n{body('a')}",
    "other case, numbers and marks": f"Greet them all.\n\n{body('a').upper().replace(',', ' 12;')}",
    "the same summary": f"SAY: hello to all.\n\n{body('b')}",
    "a passage": f"Greet them all.\n\n{body('b')} {' '.join(body('a').split()[2:10])}",
}


@pytest.mark.parametrize("case", SAME)
def test_what_shares_text_with_an_earlier_pair_is_left_out(package, case):
    first = f"Say hello to all.\n\n{body('a')}"
    assert package(first, SAME[case]) == [(body("a"), "Say hello to all.")]


def test_seven_words_in_common_are_no_passage(package):
    few = " ".join(body("a").split()[2:9])
    assert len(package(f"Say hello to all.\n\n{body('a')}", f"Greet them all.\n\n{body('b')} {few}")) == 2


def test_tests_are_left_out(package):
    tests = f'"""What the tests are.\n\n{body("t")}\n"""\n'
    assert package(f"Say hello to all.\n\n{body('a')}", tests=tests) == [(body("a"), "Say hello to all.")]


def test_packages_without_pairs_are_refused(package):
    with pytest.raises(
        UserError, match=r"data\.summaries: no docstring with a summary line .* some_package: give other"
    ):
        package("Say hello.")
    with pytest.raises(UserError, match=r"data\.summaries: there is no installed package 'no_such_package'"):
        list(read_summary_pairs(["no_such_package"]))


def test_standard_library_gives_a_thousand_pairs_that_share_nothing():
    pairs = texts_of_records(read_summary_pairs(["stdlib"]))
    assert len(pairs) > 1000
    passages = Counter()
    for texts in pairs:
        word_lists = [re.findall(r"[^\W\d_]+", text.lower()) for text in texts]
        passages.update(
            {tuple(w[i : i + PASSAGE_WORDS]) for w in word_lists for i in range(len(w) - PASSAGE_WORDS + 1)}
        )
    assert len(passages) > 10_000
    assert max(passages.values()) == 1
    assert max(Counter(summary.lower() for _, summary in pairs).values()) == 1


def test_template_stands_around_the_text(package):
    package(f"Say hello to all.\n\n{body('a')}")
    assert texts_of(DataSection(summaries=["some_package"], template=TEMPLATE)) == [
        (f"Summarize the following:\n{body('a')}\nSummary:\n", "Say hello to all.")
    ]


def test_cache_follows_the_sources(package, tiny_config):
    text = tiny_config.read_text(encoding="utf-8").replace("max_length: 48", "max_length: 400")
    tiny_config.write_text(re.sub(r"files: \[.*?\]", "summaries: [some_package]", text), encoding="utf-8")
    config = load_config(str(tiny_config), ["data.eval_rows=2"])
    words = ["one", "two", "three", "four", "five"]
    rows = []
    for count in (4, 5):
        package(*(f"This is about {word}.\n\n{body(word)}" for word in words[:count]))
        rows.append(len(prepare(config).train))
    assert rows == [2, 3]
