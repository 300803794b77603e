"""What is fuzzed: each target takes what hypothesis draws, and fails on any error that is not told in a line."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from moreh.accelerator.registry_content import parse_registry
from moreh.cli.cluster_file import read_cluster_file
from moreh.errors import CheckpointError, MorehError
from moreh.models.architecture import Architecture
from moreh.models.describe.from_source import describe_config
from moreh.planner.plan.notation import parse_plan, plan_text
from moreh.planner.plan.plan import Training
from moreh.runtime.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    find_damage,
    read_manifest,
    sum_of_file,
    write_manifest,
)
from tests.fuzz.strategies import TEXTS, VALUES, changed_json, damaged
from tests.helpers.planner.plan_tool import MODEL
from utils.config.schema import Config
from utils.config.yaml_file import load_config
from utils.data.cache import find_damage as find_cache_damage
from utils.data.cache import write_atomically
from utils.data.records import UnusableRow
from utils.data.sources.file_readers import read_file
from utils.errors import UserError
from utils.report.live import write_report
from utils.text.template import FILE_NAME, load_template

Draw = Callable[[st.SearchStrategy[Any]], Any]
SETTINGS: dict[str, Any] = {
    "run": {"name": "tiny", "directory": "runs"},
    "accelerator": {"model": "xLarge.512GB", "advanced_parallelization": {"num_stages": "auto"}},
    "model": {"architecture": {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64}},
    "tokenizer": {"vocabulary_size": 300},
    "data": {"docstrings": ["stdlib"], "max_length": 48, "eval_rows": 8, "template": "{prompt}"},
    "train": {"steps": 4, "lr": 1e-3, "optimizer": "adamw", "optimizer_settings": {"betas": [0.9, 0.95]}},
    "checkpoint": {"every_steps": 2},
    "log": {"every_steps": 2, "trackers": []},
}
REGISTRY = {
    "current": 0,
    "next_job_id": 2,
    "accelerators": [{"index": 0, "model": "xLarge.512GB", "token": "a", "chosen": False}],
    "jobs": [{"id": 1, "accelerator": 0, "pid": 1, "process_start_time": 0.0, "command": "x", "run": ""}],
}
RUN = {"started": 1.0, "samples": [{"step": 1, "text": "a"}], "plans": [], "environment": {"a": "b"}, "total_steps": 9}
ROWS = [{"prompt": f"p {i}", "response": f"r {i}", "number": i} for i in range(5)]


@contextlib.contextmanager
def folder():
    """A directory for one example."""
    with tempfile.TemporaryDirectory(prefix="moreh-fuzz-") as name:
        yield Path(name)


def settings(draw: Draw) -> None:
    """A settings file of any content."""
    content = draw(changed_json(SETTINGS))
    text = draw(st.sampled_from([yaml.safe_dump, json.dumps]))(content)
    data = text.encode("utf-8", "surrogatepass")
    if not draw(st.integers(0, 3)):
        data = draw(damaged(data))
    with folder() as directory, contextlib.suppress(UserError):
        (directory / "a.yaml").write_bytes(data)
        load_config(str(directory / "a.yaml"), [])


@cache
def setting_names() -> list[str]:
    """All settings by their names, and some that are none."""
    names = [f"{name}.{key}" for name, field in Config.model_fields.items() for key in _keys(field.annotation)]
    return [*names, "train", "x.y", "train.lr.x", "model.architecture.n_layer", "train.optimizer_settings.eps", ""]


def _keys(section: Any) -> list[str]:
    return list(section.model_fields)


def overrides(draw: Draw) -> None:
    """Settings on the command line."""
    values = TEXTS | VALUES.map(lambda value: yaml.safe_dump(value, default_flow_style=True)) | st.text(max_size=30)
    names = st.sampled_from(setting_names()) | TEXTS
    given = [f"{draw(names)}={draw(values)}" for _ in range(draw(st.integers(1, 3)))]
    with folder() as directory, contextlib.suppress(UserError):
        (directory / "a.yaml").write_text(yaml.safe_dump(SETTINGS), encoding="utf-8")
        load_config(str(directory / "a.yaml"), given)


@cache
def data_files() -> dict[str, bytes]:
    """A good file of each format, by its name."""
    import bz2
    import gzip
    import io
    import lzma

    import pyarrow
    import pyarrow.parquet

    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    table, parquet = pyarrow.Table.from_pylist(ROWS), io.BytesIO()
    pyarrow.parquet.write_table(table, parquet)
    csv = "prompt,response\n" + "".join(f'"p {i}",r {i}\n' for i in range(5))
    return {
        "a.jsonl": lines,
        "a.json": json.dumps(ROWS).encode(),
        "a.csv": csv.encode(),
        "a.tsv": csv.replace(",", "\t").encode(),
        "a.txt": b"one\ntwo\n",
        "a.parquet": parquet.getvalue(),
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.bz2": bz2.compress(lines),
        "a.jsonl.xz": lzma.compress(lines),
    }


def readers(draw: Draw) -> None:
    """A data file of each format, damaged, and all its texts read."""
    files = data_files()
    name = draw(st.sampled_from(sorted(files)))
    if name.endswith(("json", "jsonl")) and draw(st.booleans()):
        rows = draw(changed_json(ROWS))
        lines = rows if isinstance(rows, list) else [rows]
        text = json.dumps(rows) if name.endswith("json") else "".join(json.dumps(row) + "\n" for row in lines)
        content = text.encode("utf-8", "surrogatepass")
    else:
        content = draw(damaged(files[name], tuple(files.values())))
    with folder() as directory:
        (directory / name).write_bytes(content)
        with contextlib.suppress(UserError):
            for record in read_file(directory / name):
                for field in ("prompt", "response"):
                    with contextlib.suppress(UnusableRow):
                        record.text(field)


def registry(draw: Draw) -> None:
    """The file of the registry."""
    from moreh.cli.smi_collect import collect_reports
    from moreh.cli.smi_report import as_json, draw_reports

    content = draw(changed_json(REGISTRY))
    with contextlib.suppress(MorehError):
        reports = collect_reports(parse_registry(content, Path("registry.json")))
        draw_reports(reports, physical=True)
        json.dumps(as_json(reports, physical=True))


@cache
def _training() -> Training:
    architecture: Architecture = describe_config(MODEL, "small")
    return Training(architecture, 48, 128)


def notation(draw: Draw) -> None:
    """The text of a plan. What is accepted is written and read again as the same plan."""
    number = st.integers(0, 300).map(str) | st.sampled_from(["", "-1", "9999999", "99999999", "1.5", "x", "²"])
    names = ("tp", "pp", "dp", "cp", "mb", "interleaved:", "zero-bubble:", "recompute:", "shard:", "layers:")
    values = (
        number
        | st.tuples(number, number).map("x".join)
        | st.lists(number, max_size=9).map(",".join)
        | st.sampled_from(["full", "none", "selective", "optimizer", "gradients", "parameters"])
    )
    field = st.tuples(st.sampled_from(names), values).map("".join) | st.sampled_from(["sp", "zbv", "1f1b"]) | TEXTS
    text = " ".join(draw(st.lists(field, max_size=6)))
    devices = draw(st.sampled_from([1, 2, 8, 64, 96]))
    with contextlib.suppress(MorehError):
        plan = parse_plan(text, _training(), devices)
        assert parse_plan(plan_text(plan), _training(), devices) == plan


def architectures(draw: Draw) -> None:
    """A config.json for the planner."""
    content = draw(changed_json(MODEL))
    with contextlib.suppress(MorehError):
        describe_config(content if isinstance(content, dict) else {"model_type": content}, "a")


def clusters(draw: Draw) -> None:
    """A file of a cluster."""
    good = {"device": "H200", "devices_per_node": 8, "nodes": 2, "network_gbit_per_device": 400}
    data = yaml.safe_dump(draw(changed_json(good))).encode("utf-8", "surrogatepass")
    if not draw(st.integers(0, 3)):
        data = draw(damaged(data))
    with folder() as directory, contextlib.suppress(MorehError):
        (directory / "a.yaml").write_bytes(data)
        read_cluster_file(directory / "a.yaml")


def reports(draw: Draw) -> None:
    """What a run leaves for its report."""
    with folder() as directory:
        metrics = "".join(json.dumps({"step": i, "loss": 1.0 / i, "step_s": 0.1}) + "\n" for i in range(1, 9)).encode()
        (directory / "config.yaml").write_bytes(draw(damaged(b"run: {name: a}\n")))
        (directory / "run.json").write_text(json.dumps(draw(changed_json(RUN))), encoding="utf-8")
        (directory / "metrics.jsonl").write_bytes(draw(damaged(metrics)))
        write_report(directory)


def templates(draw: Draw) -> None:
    """The template that is saved with a model."""
    with folder() as directory, contextlib.suppress(UserError):
        content = json.dumps(draw(changed_json({"template": "Say {prompt} {x}.", "control_tokens": "text"})))
        (directory / FILE_NAME).write_text(content, encoding="utf-8")
        template = load_template(str(directory))
        if template is not None and template != "chat":
            template.is_applied_to("a")
            template.fill("a", {})


@cache
def _entry() -> Path:
    """An entry of the cache, which stays until the process ends."""
    directory = Path(tempfile.mkdtemp(prefix="moreh-fuzz-cache-")) / "data-1"

    def write(target: Path) -> None:
        for name in ("rows.arrow", "train.npy", "tokenizer/tokenizer.json"):
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).write_bytes(name.encode() * 20)

    write_atomically(directory, write)
    return directory


def caches(draw: Draw) -> None:
    """An entry of the cache: every damage is noticed."""
    with folder() as directory:
        entry = shutil.copytree(_entry(), directory / "data-1")
        assert find_cache_damage(entry) is None
        damage_one(draw, entry)
        assert find_cache_damage(entry) is not None


@cache
def _checkpoint() -> Path:
    """A checkpoint, which stays until the process ends."""
    from tests.helpers.training_states import save_alone

    directory = Path(tempfile.mkdtemp(prefix="moreh-fuzz-checkpoint-")) / "step-1"
    save_alone(directory)
    return directory


def damage_one(draw: Draw, directory: Path) -> None:
    """Damage, remove or exchange a file of a directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    path = draw(st.sampled_from(files))
    if draw(st.integers(0, 9)):
        path.write_bytes(draw(damaged(path.read_bytes(), tuple(file.read_bytes() for file in files if file != path))))
    else:
        path.unlink()


def checkpoints(draw: Draw) -> None:
    """A checkpoint: every damage is noticed; with checksums that fit, reading it ends with one kind of error."""
    from moreh.runtime.checkpoint.training_state import load_extra

    with folder() as directory:
        checkpoint = shutil.copytree(_checkpoint(), directory / "step-1")
        about = read_manifest(checkpoint).about
        damage_one(draw, checkpoint)
        assert find_damage(checkpoint) is not None
        files = {path.name: sum_of_file(path) for path in checkpoint.iterdir() if path.name != MANIFEST}
        write_manifest(checkpoint, Manifest(files, about))
        with contextlib.suppress(CheckpointError):
            load_extra(checkpoint)


TARGETS = (
    settings,
    overrides,
    readers,
    registry,
    notation,
    architectures,
    clusters,
    reports,
    templates,
    caches,
    checkpoints,
)
