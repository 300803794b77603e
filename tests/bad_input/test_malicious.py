"""A file of a stranger runs nothing, whatever kind of file it is: each would make a marker."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from moreh.runtime.checkpoint.manifest import MANIFEST, Manifest, sum_of_file, write_manifest
from tests.bad_input.running import TRACEBACK, run_tool

TOOLS = {
    "train": ["model={{pretrained: {0}/model}}", "tokenizer={{}}", "run.name=next", "train.steps=1"],
    "generate": ["{0}/model", "hello", "--max-new-tokens", "2"],
    "export": ["{0}/model", "{0}/exported"],
    "plan": ["{0}/model", "--batch-size", "8", "--sequence-length", "8"],
}


class Evil:
    """An object whose pickle makes a directory when it is read."""

    def __init__(self, path):
        self._path = str(path)

    def __reduce__(self):
        return os.mkdir, (self._path,)


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """The directory that hostile code makes. Code beside the files would be found by its name as well."""
    monkeypatch.setenv("HOSTILE_MARKER", str(tmp_path / "marker"))
    monkeypatch.syspath_prepend(tmp_path / "nowhere")
    return tmp_path / "marker"


@pytest.fixture
def model(tiny_run, tmp_path):
    """A copy of the tiny model, with files of code in it."""
    directory = shutil.copytree(tiny_run[1]["model"], tmp_path / "model")
    code = "import os\nos.makedirs(os.environ['HOSTILE_MARKER'], exist_ok=True)\nclass Evil:\n    pass\n"
    for name in ("evil.py", "configuration_evil.py", "custom_generate/generate.py", "setup.py", "__init__.py"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(code + "def generate(*args, **kwargs):\n    pass\n", encoding="utf-8")
    return directory


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


AUTO_MAP = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModel"), "evil.Evil")


def code_of_unknown_model(model, marker):
    change(model / "config.json", model_type="evil", auto_map=AUTO_MAP)


def code_of_known_model(model, marker):
    change(model / "config.json", auto_map=AUTO_MAP, architectures=["Evil"])


def code_of_tokenizer(model, marker):
    change(
        model / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    )


def code_of_custom_generation(model, marker):
    change(model / "generation_config.json", custom_generate=str(model))


def pickled_weights(model, marker):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Evil(marker)}))


def weights_of_torch(model, marker):
    import torch

    (model / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Evil(marker)}, model / "pytorch_model.bin")


def pickle_named_safetensors(model, marker):
    (model / "model.safetensors").write_bytes(pickle.dumps(Evil(marker)))


def pickled_adapter(model, marker):
    settings = {"base_model_name_or_path": str(model / "base"), "peft_type": "LORA", "target_modules": ["c_attn"]}
    settings["auto_mapping"] = {"base_model_class": "Evil", "parent_library": "evil"}
    shutil.copytree(model, model / "base")
    (model / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (model / "adapter_model.bin").write_bytes(pickle.dumps({"a": Evil(marker)}))


def chat_template(model, marker):
    template = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.mkdir('"
        + str(marker)
        + "') }}"
    )
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    (model / "prompt_template.json").write_text('{"format": "chat"}', encoding="utf-8")


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    "plant",
    [
        code_of_unknown_model,
        code_of_known_model,
        code_of_tokenizer,
        code_of_custom_generation,
        pickled_weights,
        weights_of_torch,
        pickle_named_safetensors,
        pickled_adapter,
        chat_template,
    ],
)
def test_model_of_a_stranger_runs_nothing(model, marker, tiny_run, tmp_path, state_directory, plant, tool):
    plant(model, marker)
    arguments = [argument.format(tmp_path) for argument in TOOLS[tool]]
    # Somebody, or a script, that says yes to every question.
    _, errors = run_tool(tool, arguments, tiny_run[0], input="y\n" * 9)
    assert not marker.exists()
    assert TRACEBACK not in errors


class Kind(pa.ExtensionType):
    """A type of Arrow whose description in a file is a pickle, as that of a PyExtensionType was."""

    def __init__(self, marker=""):
        self.marker = marker
        super().__init__(pa.string(), "arrow.py_extension_type")

    def __arrow_ext_serialize__(self):
        return pickle.dumps(Evil(self.marker))


def table_of(marker):
    texts = pa.array([f"text {i}" for i in range(40)])
    hostile = pa.ExtensionArray.from_storage(Kind(marker), texts)
    return pa.table({"prompt": hostile, "response": texts})


def write_arrow(table, path):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)


def parquet_file(directory, marker):
    pyarrow.parquet.write_table(table_of(marker), directory / "d.parquet")
    return f"data.files=[{directory / 'd.parquet'}]"


def saved_dataset(directory, marker):
    import datasets

    saved = directory / "saved"
    datasets.Dataset.from_dict({"prompt": ["a"] * 40, "response": list(map(str, range(40)))}).save_to_disk(saved)
    table = table_of(marker)
    with (
        pa.OSFile(str(saved / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as out,
    ):
        out.write_table(table)
    change(saved / "state.json", _format_type="evil", _format_kwargs={"a": 1}, evil={"__reduce__": "os.mkdir"})
    return f"data.files=[{saved}]"


def loading_script(directory, marker):
    folder = directory / "hub"
    folder.mkdir()
    (folder / "hub.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n", encoding="utf-8")
    (folder / "d.jsonl").write_text('{"prompt": "a", "response": "b"}\n', encoding="utf-8")
    return f"data={{hub: {folder}, eval_rows: 1}}"


def template_file(directory, marker):
    text = "{% set x = cycler.__init__.__globals__.os.mkdir('" + str(marker) + "') %}"
    (directory / "t.jinja").write_text(text, encoding="utf-8")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (directory / "c.jsonl").write_text(json.dumps({"messages": chat}) + "\n", encoding="utf-8")
    return f"data={{files: [{directory}/c.jsonl], format: chat, chat_template: {directory}/t.jinja}}"


def pickles(directory, marker):
    for suffix in ("jsonl", "json", "csv", "txt", "parquet", "jsonl.gz", "pkl"):
        (directory / f"d.{suffix}").write_bytes(pickle.dumps(Evil(marker)))
    return f"data.files=['{directory}/d.*']"


@pytest.mark.parametrize("plant", [parquet_file, saved_dataset, loading_script, template_file, pickles])
def test_data_of_a_stranger_runs_nothing(plant, marker, tiny_run, tmp_path, state_directory):
    override = plant(tmp_path, marker)
    cache = f"run.cache_directory={tmp_path / 'cache'}"
    _, errors = run_tool("train", [override, cache, "run.name=next", "train.steps=1"], tiny_run[0])
    assert not marker.exists()
    assert TRACEBACK not in errors


def test_cache_of_a_stranger_runs_nothing(marker, tiny_run, tmp_path, state_directory):
    """With checksums that fit: whoever changes a file can write them too."""
    command = [f"run.cache_directory={tmp_path / 'cache'}", "run.name=cached", "train.steps=1"]
    assert run_tool("train", command, tiny_run[0])[0] == 0
    (entry,) = (tmp_path / "cache").glob("data-*")

    def hostile_array(path):
        np.save(path, np.array([Evil(marker)], dtype=object), allow_pickle=True)

    def hostile_tokenizer(path):
        change(path, tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})
        (path.parent / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n", encoding="utf-8")

    for name, plant in {
        "train.npy": hostile_array,
        "rows.arrow": lambda path: write_arrow(table_of(marker), path),
        "counts.json": lambda path: path.write_bytes(pickle.dumps(Evil(marker))),
        "tokenizer/tokenizer_config.json": hostile_tokenizer,
    }.items():
        kept = tmp_path / "kept"
        shutil.copytree(entry, kept)
        plant(entry / name)
        files = [path for path in entry.rglob("*") if path.is_file() and path.name != MANIFEST]
        sums = {path.relative_to(entry).as_posix(): sum_of_file(path) for path in files}
        write_manifest(entry, Manifest(sums, {"entry": entry.name}))
        _, errors = run_tool("train", command, tiny_run[0])
        assert not marker.exists(), name
        assert TRACEBACK not in errors, name
        shutil.rmtree(entry)
        kept.rename(entry)


TAGS = [
    "!!python/object/apply:os.mkdir ['{0}']",
    "!!python/object/new:os.mkdir ['{0}']",
    "!!python/name:os.mkdir",
    "!!python/module:evil",
    "!!python/object/apply:subprocess.check_output [[mkdir, '{0}']]",
]


@pytest.mark.parametrize("tag", TAGS)
def test_settings_of_a_stranger_run_nothing(tag, marker, tiny_run, tmp_path, state_directory):
    text = tag.format(marker)
    (tmp_path / "a.yaml").write_text(f"run: {text}\n", encoding="utf-8")
    for arguments in (["--config", str(tmp_path / "a.yaml")], [f"train.lr={text}"], [f"data.files=[{text}]"]):
        code, errors = run_tool("train", arguments, tiny_run[0])
        assert code == 2
        assert not marker.exists()
        assert TRACEBACK not in errors


def test_state_of_a_stranger_runs_nothing(marker, tiny_run, tmp_path, state_directory):
    """The registry, statuses of jobs, profiles of this machine, and what a run leaves for its report."""
    (state_directory / "jobs").mkdir(parents=True)
    run = shutil.copytree(tiny_run[1]["run"], tmp_path / "run")
    stream = io.BytesIO()
    pickle.dump(Evil(marker), stream, protocol=0)
    hostile = stream.getvalue()
    for path in (
        state_directory / "registry.json",
        state_directory / "jobs" / "1.json",
        state_directory / "this-machine-1.json",
        run / "run.json",
        run / "metrics.jsonl",
        run / "config.yaml",
    ):
        path.write_bytes(hostile)
    commands = [("smi", []), ("switch", ["1"]), ("report", [str(run)]), ("plan", [*TOOLS["plan"]])]
    for tool, arguments in commands:
        _, errors = run_tool(tool, [argument.format(tmp_path) for argument in arguments], tiny_run[0])
        assert not marker.exists()
        assert TRACEBACK not in errors


def test_the_marker_can_be_made(marker):
    """What the tests above look for: where a file is read as code or as a pickle, it is there."""
    pickle.loads(pickle.dumps(Evil(marker)))
    assert Path(marker).is_dir()
