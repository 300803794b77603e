"""Fixtures that all tests share: a registry of their own, tiny models and data, and scripts run as a user runs them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Set before torch is imported anywhere, so that no test uses the user's own accelerators or asks a hub.
os.environ["MOREH_STATE_DIR"] = tempfile.mkdtemp(prefix="moreh-test-state-")
os.environ["HF_HUB_OFFLINE"] = "1"
# Lines wrap at the width of the console, which is not the same everywhere.
os.environ["COLUMNS"] = "100"
# Threads sleep early instead of spinning, since most of the tests' processes share the cores with others.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# A shell's background jobs ignore Ctrl-C, and so would all processes that the tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(ROOT))

# Settings of a run that takes about a second. The hook is off: once called, it is on for the whole test process.
TINY_CONFIG = """
run: {{name: tiny, directory: {directory}, cache_directory: {directory}/cache}}
accelerator: {{advanced_parallelization: null}}
model:
  architecture: {{model_type: gpt2, n_layer: 1, n_embd: 32, n_head: 2, n_positions: 64,
                 resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0}}
tokenizer: {{vocabulary_size: 300}}
data: {{files: [{data}], max_length: 48, eval_rows: 8}}
train: {{steps: 4, batch_size: 8, lr: 1.0e-3}}
log: {{every_steps: 2, sample_tokens: 4}}
"""


@pytest.fixture(scope="session")
def machine_profiles():
    """The directory of this machine's profiles: made-up ones, since noise of a measurement would choose the plans."""
    from moreh.planner.hardware.local_profile import keep_profile
    from tests.helpers.planner.synthetic_profile import synthetic_profile

    directory = Path(os.environ["MOREH_STATE_DIR"])
    directory.mkdir(exist_ok=True)
    for workers in (1, 2, 4, 8):
        keep_profile(replace(synthetic_profile(workers), memory_mib=16 * 1024 // workers))
    return directory


@pytest.fixture
def state_directory(tmp_path, monkeypatch):
    """An empty registry for one test."""
    monkeypatch.setenv("MOREH_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def environment(state_directory, machine_profiles):
    """The environment variables of a user's own shell, with an empty registry."""
    state_directory.mkdir(exist_ok=True)
    for profile in machine_profiles.glob("this-machine-*.json"):
        shutil.copy(profile, state_directory)
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def run_process(environment):
    """Run a command to its end; returns the completed process with its output as text."""

    def run_command(*command, input=None, cwd=ROOT, **variables):
        finished = subprocess.run(
            [str(part) for part in command],
            input=input.encode() if isinstance(input, str) else input,
            cwd=cwd,
            env={**environment, **variables},
            capture_output=True,
            timeout=300,
        )
        finished.stdout, finished.stderr = finished.stdout.decode(), finished.stderr.decode()
        return finished

    return run_command


@pytest.fixture
def run(run_process):
    """`run_process`; `run_forked` in modules that say so."""
    return run_process


@pytest.fixture
def run_forked(run_process, environment):
    """Like `run_process`, without the seconds in which Python imports torch and transformers for a script.

    A module whose tests are not about the start of a script makes this its `run`, and with it its `run_python`.
    """
    from tests.helpers.scripts import fork_server

    def run_command(*command, input=None, cwd=ROOT, **variables):
        if fork_server.AVAILABLE and command[0] == sys.executable and str(command[1]).endswith(".py"):
            return fork_server.run_forked(command[1:], cwd=cwd, env={**environment, **variables}, input=input)
        return run_process(*command, input=input, cwd=cwd, **variables)

    return run_command


@pytest.fixture
def run_python(run, tmp_path):
    """Run Python source as a user's script."""
    return _source_runner(run, tmp_path)


def _source_runner(run, tmp_path):
    def run_source(source, *arguments, **variables):
        script = tmp_path / "script.py"
        script.write_text(source, encoding="utf-8")
        return run(sys.executable, script, *arguments, cwd=tmp_path, **variables)

    return run_source


@pytest.fixture
def run_python_forked(run_forked, tmp_path):
    """`run_python` for single tests of a module: see `run_forked`."""
    return _source_runner(run_forked, tmp_path)


@pytest.fixture
def tiny_rows():
    """Forty pairs of different lengths."""
    return [
        {"prompt": f"def add_{i}(x):\n", "response": "    return x" + " + 1" * (i % 7) + f" + {i}\n"} for i in range(40)
    ]


@pytest.fixture
def tiny_config(tmp_path, tiny_rows):
    """The path of a settings file for a run on those pairs."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows), encoding="utf-8")
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY_CONFIG.format(directory=tmp_path / "runs", data=data), encoding="utf-8")
    return config


@pytest.fixture
def train(tiny_config, tmp_path):
    """Run train_gpt.py in this process with the tiny settings and some overrides; returns the run's directory."""
    import train_gpt
    from utils.cli import run_main
    from utils.config.yaml_file import load_config

    def train_tiny(*overrides):
        run_main(train_gpt.main, load_config(str(tiny_config), list(overrides)))
        return tmp_path / "runs" / "tiny"

    return train_tiny


@pytest.fixture
def read_metrics():
    """The lines of a run's metrics.jsonl."""

    def read(directory):
        return [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    return read


@pytest.fixture
def few_label_positions():
    """Only label positions reach the output layer, in short rows too: their number is rounded up to a multiple of 4."""
    from tests.helpers.batches import label_positions_rounded_to

    with label_positions_rounded_to(4):
        yield


@pytest.fixture
def make_gpt2():
    """Build a tiny GPT-2 with random weights."""

    def make(**changes):
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        settings = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 64}
        settings |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**settings | changes))
        model.loss_type = "ForCausalLM"
        return model

    return make
