"""A tiny run with its model and a checkpoint, which cases damage."""

import json

import pytest

from tests.bad_input.running import run_tool
from tests.conftest import TINY_CONFIG


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """Its settings, and the directories that cases copy: run, model and checkpoint."""
    directory = tmp_path_factory.mktemp("tiny-run")
    rows = [{"prompt": f"def add_{i}(x):\n", "response": f"    return x{' + 1' * (i % 7)} + {i}\n"} for i in range(40)]
    data = directory / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = directory / "tiny.yaml"
    settings.write_text(TINY_CONFIG.format(directory=directory / "runs", data=data), encoding="utf-8")
    code, errors = run_tool("train", ["checkpoint.every_steps=4"], settings)
    assert code == 0, errors
    run = directory / "runs" / "tiny"
    return settings, {"run": run, "model": run / "model", "checkpoint": run / "checkpoints" / "step-4"}
