"""Parts of pages that commands write are what the commands print now."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.helpers.markdown import generated


def printed(module):
    command = [sys.executable, "-m", module]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout.strip()


@pytest.mark.parametrize(
    ("page", "name", "module"),
    [
        ("docs/patches.md", "patches", "moreh.patches"),
        ("docs/families.md", "families", "moreh.models.families"),
    ],
)
def test_part_of_a_page_is_what_its_command_prints(page, name, module):
    assert generated(ROOT / page, name) == printed(module), f"write the output of `python -m {module}` into {page}"


def test_page_of_the_configuration_is_what_its_command_prints():
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8").strip()
    assert text == printed("utils.config"), "write the output of `python -m utils.config` into docs/configuration.md"
