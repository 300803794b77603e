"""The pages of the documentation: short lines, working links, languages of code blocks, settings that load."""

import re

import pytest
import yaml

from tests.conftest import ROOT
from tests.helpers.markdown import PAGES, blocks, commands, links, prose_lines

LANGUAGES = {"bash", "bash slow", "python", "yaml", "text", "mermaid", "json"}
IDS = [page.name for page in PAGES]
# A table whose rows a command writes: Markdown cannot break them.
WRITTEN_TABLES = {"conformance.md"}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_lines_have_at_most_120_characters(page):
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
    is_written = page.name in WRITTEN_TABLES
    long = [number for number, line in lines if len(line) > 120 and not (is_written and line.startswith("|"))]
    assert not long, f"{page.name}: lines {long}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_each_sentence_has_a_line_of_its_own(page):
    several = []
    for number, line in prose_lines(page):
        if not line.startswith(("|", "#", "    ", "!")):
            text = re.sub(r"`[^`]*`", "code", line).replace("e.g.", "").replace("i.e.", "").replace("...", "")
            if re.search(r"[a-z)*][.?!] +[A-Z`]", text):
                several.append(number)
    assert not several, f"{page.name}: lines {several} have several sentences"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_to_files(page):
    missing = [target for target in links(page) if not (page.parent / target).exists()]
    assert not missing, f"{page.name}: {missing}"


def test_readme_links_every_page():
    linked = {(ROOT / target).resolve() for target in links(ROOT / "README.md")}
    assert {page for page in PAGES if page.name != "README.md"} <= linked


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_code_blocks_are_of_known_languages(page):
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page.name}:{block.line}: {block.language!r}"
        if block.language == "python":
            compile(block.text, f"{page.name}:{block.line}", "exec")
        if block.language == "yaml":
            assert isinstance(yaml.safe_load(block.text), dict), f"{page.name}:{block.line}"
        if block.language.startswith("bash"):
            assert commands(block), f"{page.name}:{block.line}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_nothing_is_left_to_be_filled_in(page):
    assert "@@" not in page.read_text(encoding="utf-8")
