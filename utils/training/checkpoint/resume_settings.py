"""Compares the settings of a run with those of the checkpoint that it resumes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from moreh.runtime.engine.checkpoint_api import software_versions
from utils.config.schema import RESUME_KEYS, RESUME_WITH_KEYS, Config
from utils.data.dataset import RunData
from utils.errors import UserError
from utils.training.checkpoint.base_weights import base_fingerprint

# Settings that a resumed run may change: they change none of its numbers but the plan's rounding, or are the
# length of the run.
_FREE_SECTIONS = ("run.", "log.", "checkpoint.", "stop.", "launch.", "accelerator.", "versions.")
_FREE = ("train.steps", "train.epochs", "train.loader_workers", "train.non_finite")
# Names of files whose content is compared: another name of the same content is allowed.
_NAMES_OF_DATA = tuple(
    f"data.{key}"
    for key in ("docstrings", "summaries", "files", "eval_files", "hub", "hub_configuration", "split", "sources")
)
_NAMES = {
    **dict.fromkeys(_NAMES_OF_DATA, ("content.training_rows", "content.held_out_rows")),
    "tokenizer.pretrained": ("content.tokenizer",),
    "model.pretrained": ("content.tokenizer", "content.architecture", "content.frozen_weights"),
}
# Keys of a model's configuration that do not affect its results.
_NO_ARCHITECTURE = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}
_SHOWN_CHARACTERS = 48

Kind = Literal["free", "with", "refused"]


@dataclass(frozen=True)
class Difference:
    """A key whose value is not that of the checkpoint."""

    key: str
    """The setting, or `content.<what>`, or `optimizer`, or `versions.<package>`."""
    saved: Any
    """The value in the checkpoint; None if there is none."""
    now: Any
    """The value in this run; None if there is none."""
    kind: Kind
    """The condition for a change: none, `--resume-with` names the setting, or `--force`."""

    @property
    def text(self) -> str:
        """The two values."""
        return f"{self.key} {_shown(self.saved)} -> {_shown(self.now)}"


def describe_run(config: Config, data: RunData, model: Any) -> dict[str, Any]:
    """A checkpoint's facts about the run: its settings, and hashes of its data, tokenizer and model."""
    return {"settings": _settings(config.model_dump(mode="json")), "content": _content(config, data, model)}


def _content(config: Config, data: RunData, model: Any) -> dict[str, Any]:
    architecture = getattr(model, "config", None)
    keys = {} if architecture is None else json.loads(architecture.to_json_string(use_diff=False))
    return {
        "training_rows": data.content["train"],
        "held_out_rows": data.content["evaluation"],
        "tokenizer": data.content["tokenizer"],
        "frozen_weights": base_fingerprint(model, config),
        "architecture": {key: keys[key] for key in sorted(keys.keys() - _NO_ARCHITECTURE)},
    }


def _settings(dumped: dict[str, Any]) -> dict[str, Any]:
    checkpoint = {key: value for key, value in dumped["checkpoint"].items() if key not in RESUME_KEYS}
    return {**dumped, "checkpoint": checkpoint}


def compare(about: Mapping[str, Any], now: Mapping[str, Any], optimizers: Sequence[str]) -> list[Difference]:
    """The differences between a checkpoint (`about`, from its manifest) and a run, as `describe_run` returns them."""
    script = about["script"]
    saved = {**_flat(_with_defaults(script["settings"])), **_flat(script["content"], "content.")}
    saved |= {"optimizer": ", ".join(about["optimizers"]), **_flat(about["versions"], "versions.")}
    current = {**_flat(now["settings"]), **_flat(now["content"], "content.")}
    current |= {"optimizer": ", ".join(optimizers), **_flat(software_versions(), "versions.")}
    keys = [*current, *(key for key in saved if key not in current)]
    changed = {key for key in keys if saved.get(key) != current.get(key)}
    if "content.frozen_weights" not in saved:  # an older checkpoint, which has the frozen weights in it
        changed.discard("content.frozen_weights")
    # The model's configuration has the keys of the settings as well.
    changed -= {f"content.{key.removeprefix('model.')}" for key in changed if key.startswith("model.architecture.")}
    changed_content = {".".join(key.split(".")[:2]) for key in changed if key.startswith("content.")}
    return [
        Difference(key, saved.get(key), current.get(key), _kind(key, changed_content)) for key in keys if key in changed
    ]


def _kind(key: str, changed_content: set[str]) -> Kind:
    if key in RESUME_WITH_KEYS:
        return "with"
    names = next((contents for name, contents in _NAMES.items() if key == name), None)
    is_other_name = names is not None and changed_content.isdisjoint(names)
    return "free" if key in _FREE or key.startswith(_FREE_SECTIONS) or is_other_name else "refused"


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint with those that an older version did not have."""
    try:
        return _settings(Config.model_validate(settings).model_dump(mode="json"))
    except ValidationError:  # such as a directory that is not there any more
        return settings


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested keys with dots between them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def require_same(differences: Sequence[Difference], config: Config, checkpoint: Path) -> None:
    """Refuse a run that is not a continuation of the checkpoint.

    Raises:
        UserError: a setting differs that must not, or may but was not named.
    """
    if config.checkpoint.resume_force:
        return
    refused = [difference.text for difference in differences if difference.kind == "refused"]
    unnamed = [
        difference
        for difference in differences
        if difference.kind == "with" and difference.key not in (config.checkpoint.resume_with or ())
    ]
    problems = []
    if refused:
        problems.append(
            f"--resume (checkpoint.resume): {checkpoint} is of another training: {', '.join(refused)}; give the values "
            "of the checkpoint, start a new run, or resume nevertheless with --resume-force"
        )
    if unnamed:
        options = " ".join(f"--resume-with {difference.key}={_shown(difference.now)}" for difference in unnamed)
        problems.append(
            f"--resume (checkpoint.resume): {checkpoint} has other values of {_listed(unnamed)}; give those, or say "
            f"that they change: {options}"
        )
    if problems:
        raise UserError(problems)


def _listed(differences: Sequence[Difference]) -> str:
    return ", ".join(difference.text for difference in differences)


def table_of(differences: Sequence[Difference]) -> str:
    """The differences as lines: key, the checkpoint's value, this run's value."""
    rows = [(difference.key, _shown(difference.saved), _shown(difference.now)) for difference in differences]
    rows.insert(0, ("setting", "checkpoint", "now"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
