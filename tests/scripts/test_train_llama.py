"""train_llama3_70b.py, whose loop is that of train_gpt.py; and what both scripts do with workers."""

import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import train_gpt
import train_llama3_70b
from tests.conftest import ROOT
from utils.accelerator import WORKERS_VARIABLE
from utils.cli import run_main
from utils.config.schema import DataSection
from utils.config.yaml_file import load_config
from utils.data.records import Record
from utils.errors import UserError
from utils.plan_only import plan_request

SCRIPTS = (train_gpt, train_llama3_70b)
LLAMA = (
    "{model_type: llama, num_hidden_layers: 2, hidden_size: 32, intermediate_size: 48, num_attention_heads: 4, "
    "num_key_value_heads: 2, max_position_embeddings: 64, rope_parameters: {rope_type: default, rope_theta: 500000.0}, "
    "tie_word_embeddings: false}"
)
SETTINGS = (f"model={{architecture: {LLAMA}}}", 'data.template="Summarize the following:\\n{prompt}\\nSummary:\\n"')


@pytest.fixture
def run(run_forked):
    return run_forked


def test_task_is_to_write_a_summary_of_a_text():
    record = Record("here", {"article": "Long text.", "highlights": "Short."})
    fields = {"prompt_field": "article", "response_field": "highlights", "template": "Summarize:\n{prompt}\nSummary:\n"}
    data = DataSection(hub="some/data", **fields)
    assert train_llama3_70b.make_pair(record, data) == ("Summarize:\nLong text.\nSummary:\n", "Short.")
    assert train_llama3_70b.make_example([5, 6], [7], 0, "response") == ([5, 6, 7, 0], [-100, -100, 7, 0])
    assert train_llama3_70b.make_example([5, 6], [7], 0, "all") == ([5, 6, 7, 0], [5, 6, 7, 0])
    sample = train_llama3_70b.show_sample("Summary:\n", " Brief. ", "Short.\n")
    assert sample == "Summary:\nBrief.\nIn the data:\nShort."


@pytest.mark.parametrize("name", ["llama3_70b", "llama_small"])
def test_settings_of_the_project_can_be_planned(name, state_directory):
    config = load_config(str(ROOT / "configs" / f"{name}.yaml"), ["accelerator.model=8xLarge.4096GB"])
    assert config.run.name == name
    comment = re.search(r"([\d.]+) million parameters", (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    if comment is not None:
        parameters = plan_request(config).training.architecture.parameters
        assert float(comment[1]) == pytest.approx(parameters / 1e6, abs=0.05)


@pytest.mark.parametrize("name", ["llama_smollm2", "llama_smollm2_lora"])
def test_settings_of_a_model_that_was_not_fetched_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=rf"{name}\.yaml:\d+: model\.pretrained: there is no directory \./models/smollm2"
    ):
        load_config(str(ROOT / "configs" / f"{name}.yaml"), [])
    (tmp_path / "models" / "smollm2-135m").mkdir(parents=True)
    assert load_config(str(ROOT / "configs" / f"{name}.yaml"), []).run.name == name


def test_settings_of_conversations_that_were_not_written_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "smollm2-135m").mkdir(parents=True)
    chat = str(ROOT / "configs" / "llama_smollm2_chat.yaml")
    with pytest.raises(UserError, match=r"data\.files: there is no file data/docstring_chats\.jsonl"):
        load_config(chat, [])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "docstring_chats.jsonl").touch()
    assert load_config(chat, []).data.format == "chat"


def test_llama_learns_to_summarize(tiny_config, tmp_path, read_metrics, capsys):
    run_main(train_llama3_70b.main, load_config(str(tiny_config), [*SETTINGS, "train.steps=12", "train.lr=1e-2"]))
    directory = tmp_path / "runs" / "tiny"
    saved = json.loads((directory / "model" / "config.json").read_text(encoding="utf-8"))
    assert saved["architectures"] == ["LlamaForCausalLM"]
    assert (saved["num_attention_heads"], saved["num_key_value_heads"], saved["tie_word_embeddings"]) == (4, 2, False)
    assert saved["rope_parameters"]["rope_theta"] == 500000.0
    lines = read_metrics(directory)
    assert lines[-1]["eval_loss"] < 0.8 * lines[0]["eval_loss"]
    output = capsys.readouterr().out
    assert re.search(r"^\[Step 12/12\] 100% \| Loss: \d+\.\d+ \| lr .* GiB$", output, re.M)
    sample = r"^Sample:\nSummarize the following:\ndef add_\d+\(x\):\n\nSummary:\n.*?In the data:\nreturn x"
    assert len(re.findall(sample, output, re.M | re.S)) == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_process_that_starts_workers_writes_nothing(script, tiny_config, tmp_path, monkeypatch):
    """The hook never returns in it."""
    monkeypatch.delenv(WORKERS_VARIABLE, raising=False)
    workers = []

    def hook(**options):
        workers.append(os.environ[WORKERS_VARIABLE])
        raise SystemExit(0)

    monkeypatch.setattr(torch.moreh.option, "enable_advanced_parallelization", hook)
    before = sorted(tmp_path.rglob("*"))
    settings = ["accelerator={workers: 3, advanced_parallelization: {}}", "run.tensorboard=true"]
    with pytest.raises(SystemExit):
        run_main(script.main, load_config(str(tiny_config), settings))
    assert workers == ["3"]
    assert sorted(tmp_path.rglob("*")) == before


RANKS = """
import hashlib, os, sys
import torch
import torch.distributed as dist
from transformers import PreTrainedModel
import train_llama3_70b
from utils.cli import run_main
from utils.config.yaml_file import load_config
rank, directory = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
save = PreTrainedModel.save_pretrained
def collective_save(model, to):  # as the runtime does it
    weights = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    with open(f"{directory}/weights-{rank}", "w") as file:
        file.write(hashlib.sha256(weights).hexdigest())
    if rank == 0:
        save(model, to)
    dist.barrier()
PreTrainedModel.save_pretrained = collective_save
run_main(train_llama3_70b.main, load_config(sys.argv[3], sys.argv[4:]))
dist.destroy_process_group()
"""


def test_of_two_ranks_one_writes_and_both_compute_the_same(run_python, tiny_config, tmp_path, read_metrics):
    # Each rank computes alone. A simulated accelerator is for one process at a time, so each has one of its own.
    def start(rank):
        state = str(tmp_path / f"state-{rank}")
        settings = (*SETTINGS, "run.tensorboard=true", "log.eval_every_steps=2")
        return run_python(RANKS, rank, tmp_path, tiny_config, *settings, MOREH_STATE_DIR=state, PYTHONPATH=str(ROOT))

    with ThreadPoolExecutor() as pool:
        first, second = pool.map(start, range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    runs = tmp_path / "runs"
    assert sorted(path.name for path in runs.iterdir() if path.name[0] != ".") == ["cache", "tiny"]
    assert sorted(path.name for path in (runs / "tiny").iterdir()) == [
        "config.yaml",
        "loss.png",
        "metrics.jsonl",
        "model",
        "report.html",
        "run.json",
        "tensorboard",
        "train.log",
    ]
    assert len(list((runs / "tiny" / "tensorboard").iterdir())) == 1
    assert {"model.safetensors", "tokenizer.json"} <= {path.name for path in (runs / "tiny" / "model").iterdir()}
    assert [line["step"] for line in read_metrics(runs / "tiny")] == [0, 1, 2, 3, 4]
    assert first.stdout.count("[Step 4/4] | Held-out loss: ") == 1
    assert [line for line in second.stdout.splitlines() if not line.startswith(("[info] ", "  "))] == []
    assert (tmp_path / "weights-0").read_text() == (tmp_path / "weights-1").read_text()
    assert len(list((runs / "cache").glob("data-*"))) == 1


def test_lines_of_the_hook_are_in_the_log_file(run, tiny_config, tmp_path):
    """As a user runs it: the lines of the hook, which come before train.log exists, are written there as well."""
    settings = (*SETTINGS, "accelerator.advanced_parallelization={}", "accelerator.workers=1")
    finished = run(sys.executable, "train_llama3_70b.py", "--config", tiny_config, *settings)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    log = (tmp_path / "runs" / "tiny" / "train.log").read_text(encoding="utf-8")
    for text in (finished.stdout, log):
        assert text.count("[info] MoAI Accelerator is ready to use.\n") == 1
        assert len(re.findall(r"\[info\] Simulated: tp\d pp\d dp\d .* on 8 x MI250 GCD: .* a step, ", text)) == 1
