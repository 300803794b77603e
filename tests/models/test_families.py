"""The registry of families: complete in the tests, readable without torch, printed for the documentation."""

import subprocess
import sys

import pytest

from moreh.models.families import (
    FAMILIES,
    Family,
    llama,
    packable_families,
    planned_families,
    register,
    registry,
    tensor_parallel_families,
)
from moreh.models.families.__main__ import table
from tests.conftest import ROOT
from tests.helpers.models.family_settings import FAMILY_CASES


def test_every_family_has_its_test_cases():
    assert FAMILY_CASES.keys() == FAMILIES.keys()
    assert sorted(name for name, cases in FAMILY_CASES.items() if cases.tensor_parallel) == tensor_parallel_families()
    assert sorted(name for name, cases in FAMILY_CASES.items() if cases.architecture) == planned_families()


def test_every_family_file_is_registered():
    machinery = {"__init__", "__main__", "family", "hf_config", "layers", "registry", "tp_blocks"}
    files = {path.stem for path in (ROOT / "moreh" / "models" / "families").glob("*.py")} - machinery
    assert files <= FAMILIES.keys()


def test_registry_needs_neither_torch_nor_transformers(run_python):
    source = """
import sys
import moreh.models.families.__main__
import moreh.models.describe.from_config
print(len(moreh.models.families.FAMILIES), {"torch", "transformers"} & set(sys.modules))
"""
    finished = run_python(source)
    assert finished.stdout == f"{len(FAMILIES)} set()\n", finished.stderr


def test_families_are_printed_as_a_markdown_table():
    finished = subprocess.run([sys.executable, "-m", "moreh.models.families"], capture_output=True, text=True, cwd=ROOT)
    assert finished.stdout == table() + "\n", finished.stderr
    header, _, *rows = table().split("\n")
    assert header == "| family | tensor parallel | packed | planned without transformers |"
    assert [row.split("`")[1] for row in rows] == sorted(FAMILIES)
    assert "| `llama` | plan of transformers | yes | yes |" in rows
    assert "| `bloom` | own rule | no | yes |" in rows
    assert "| `gpt_bigcode` | no | yes | no |" in rows
    packed = [row.split("`")[1] for row in rows if row.split(" | ")[2] == "yes"]
    assert packed == packable_families()


def test_another_record_of_a_known_family_is_refused():
    register(llama.FAMILY)
    with pytest.raises(ValueError, match="has a family 'llama' already: give the new one a model_type of its own"):
        register(Family("llama"))
    assert registry.FAMILIES["llama"] is llama.FAMILY


def test_config_keys_without_an_architecture_are_refused():
    with pytest.raises(ValueError, match="family 'half': give both config_keys and architecture, or neither"):
        Family("half", config_keys=llama.FAMILY.config_keys)
