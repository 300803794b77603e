"""The examples in docstrings of moreh and utils give what they say."""

import doctest
import importlib
import re

import pytest

from tests.conftest import ROOT

EXAMPLE = re.compile(r"^ *>>> ", re.MULTILINE)
FILES = [
    path
    for folder in ("moreh", "utils")
    for path in (ROOT / folder).rglob("*.py")
    if EXAMPLE.search(path.read_text("utf-8"))
]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_examples_give_what_they_say(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_wrong_example_is_found():
    namespace = {"__doc__": ">>> 1 + 1\n3\n"}
    examples = doctest.DocTestParser().get_doctest(namespace["__doc__"], {}, "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(examples, out=lambda text: None).failed == 1
    assert len(FILES) > 10
