"""Reads the settings of a run from a YAML file and the command line.

All errors are reported at once, each with its file and line.
"""

from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from moreh.options import did_you_mean
from utils.config.schema import EXCLUSIVE_KEYS, RESUME_KEYS, Config
from utils.config.section import path_of
from utils.config.yaml_12 import Dumper, Loader
from utils.errors import UserError

# Where a key is nested: ("train", "lr") is train.lr, ("data", "files", 0) the first of data.files.
KeyPath = tuple[str | int, ...]
# Keys that other trainers have for settings of this one.
_NAMES_ELSEWHERE = {
    "learning_rate": "lr",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "max_seq_length": "max_length",
    "max_steps": "steps",
    "micro_batch_size": "batch_size",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "rank": "r",
    "sequence_len": "max_length",
}
# Where each key was written: ("train", "lr") -> "configs/gpt.yaml:12" or "command line".
Locations = dict[KeyPath, str]


def load_config(path: str, overrides: list[str]) -> Config:
    """The validated settings of a file, changed by overrides such as `train.lr=1e-4`.

    Raises:
        UserError: the settings are not valid; the error has one line for each problem.
    """
    content, locations = _read_yaml(path)
    problems = [problem for text in overrides if (problem := _apply_override(content, locations, text)) is not None]
    if problems:
        raise UserError(problems)
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise UserError(_describe_all(error.errors(), locations, path)) from None


def save_config(config: Config, path: Path) -> None:
    """Write all settings, defaults included, as a YAML file that `load_config` reads.

    What was resumed is left out: whoever runs the file has not asked for it.
    """
    settings = config.model_dump()
    for key in RESUME_KEYS:
        del settings["checkpoint"][key]
    path.write_text(yaml.dump(settings, Dumper=Dumper, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _read_yaml(path: str) -> tuple[dict[str, Any], Locations]:
    """The content of a file, and the line of each key.

    Raises:
        UserError: the file cannot be read, is not YAML, has no sections, or has a key twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        locations: Locations = {}
        problems = [] if node is None else _record_locations(node, (), path, locations)
        content = None if node is None or problems else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise UserError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, RecursionError) as error:  # such as a day 45, or a section that contains itself
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if problems:
        raise UserError(problems)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected sections such as 'train:' with keys, found {_shown(content)}")
    return content, locations


def _record_locations(node: yaml.Node, parent: KeyPath, path: str, locations: Locations) -> list[str]:
    """Record the line of each key below `node`; returns a problem for each key that is given twice or is not a word."""
    problems = []
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                problems.append(f"{path}:{key_node.start_mark.line + 1}: a key must be a word, not a list or a mapping")
                continue
            name, line = key_node.value, key_node.start_mark.line + 1
            key_path = (*parent, name)
            if name in seen:
                dotted = ".".join(map(str, key_path))
                problems.append(f"{path}:{line}: {dotted}: this key is already given in line {seen[name]}")
            seen[name] = line
            locations[key_path] = f"{path}:{line}"
            problems += _record_locations(value_node, key_path, path, locations)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            item_path = (*parent, index)
            locations[item_path] = f"{path}:{item.start_mark.line + 1}"
            problems += _record_locations(item, item_path, path, locations)
    return problems


def _apply_override(content: dict[str, Any], locations: Locations, text: str) -> str | None:
    """Set one `section.key=value` in `content`; returns the problem, or None."""
    dotted, equals, value_text = text.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        return f"command line: {text!r} is not a setting: write section.key=value, for example train.lr=1e-4"
    try:
        value = _override_value(tuple(keys), value_text)
    except UserError as error:
        return f"command line: {dotted}: {error}"
    except (yaml.YAMLError, ValueError, RecursionError):
        return f"command line: {dotted}: {value_text!r} is not a valid YAML value"
    section: Any = content
    for depth, key in enumerate(keys[:-1], start=1):
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            return f"command line: {dotted}: {'.'.join(keys[:depth])} is {_shown(section)}, not a section with keys"
    section[keys[-1]] = value
    # The value replaces all that the file has below the key.
    _forget(locations, tuple(keys))
    locations[tuple(keys)] = "command line"
    if len(keys) == 2 and value is not None and keys[1] in EXCLUSIVE_KEYS.get(keys[0], ()):
        for other in set(EXCLUSIVE_KEYS[keys[0]]) - {keys[1]}:
            if locations.get((keys[0], other)) != "command line":
                section.pop(other, None)
                _forget(locations, (keys[0], other))
    return None


def _forget(locations: Locations, key: KeyPath) -> None:
    for below in [key_path for key_path in locations if key_path[: len(key)] == key]:
        del locations[below]


def _override_value(keys: tuple[str, ...], text: str) -> Any:
    """A value of the command line: for a text key as typed, for all others parsed as YAML.

    A text in quotes is YAML as well, as are null and numbers where the key allows them.

    Raises:
        UserError: it is null, which a key of texts does not allow, or a list or a mapping instead of a path.
    """
    section: Any = Config
    allowed: set[type] = set()
    field: FieldInfo | None = None
    for key in keys:
        field = section.model_fields[key] if key in getattr(section, "model_fields", {}) else None
        annotation = None if field is None else field.annotation
        section, allowed = next(_sections_in(annotation), None), set(_scalars_in(annotation))
    if str not in allowed:
        return yaml.load(text, Loader=Loader)
    try:
        value = yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    if isinstance(value, str):
        return value if text[:1] in {"'", '"'} and text[:1] == text[-1:] else text
    if value is None and text.strip().lower() in {"null", "~"} and type(None) not in allowed:
        default = "" if field is None or field.is_required() else f", whose default is {field.default!r}"
        raise UserError(f"{text} is not allowed: leave the key out{default}, or write the word in quotes")
    if isinstance(value, (list, dict)) and field is not None and _is_path(field):
        raise UserError(f"{text} is not allowed: give one path, not a list or a mapping; one of that name is ./{text}")
    is_null = value is None and text.strip().lower() in {"", "null", "~"}
    return value if type(value) in allowed and (is_null or value is not None) else text


def _is_path(field: FieldInfo) -> bool:
    """True if a key takes a path: its type, or a branch of it, is `PathText`."""
    parts = [*field.metadata, *(part for branch in get_args(field.annotation) for part in get_args(branch))]
    return any(getattr(part, "func", None) is path_of for part in parts)


def _scalars_in(annotation: Any) -> Iterator[type]:
    """The types of values that a key allows; those within a list or a mapping do not count."""
    origin = get_origin(annotation)
    if origin is list:
        yield list
    if origin is Literal:
        yield from map(type, get_args(annotation))
    elif origin is Annotated:
        yield from _scalars_in(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for branch in get_args(annotation):
            yield from _scalars_in(branch)
    elif origin is None and isinstance(annotation, type):
        yield annotation


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections among the branches of a key's type, and those of which it has a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for branch in get_args(annotation):
        yield from _sections_in(branch)


def _describe_all(errors: list[ErrorDetails], locations: Locations, path: str) -> list[str]:
    """One line for each wrong key: its place, name, value and the allowed values."""
    errors_of: dict[KeyPath, list[ErrorDetails]] = {}
    for details in errors:
        *sections, last = details["loc"] or (None,)
        key_path = tuple(part for part in sections if not _is_union_branch(part))
        if last is not None and (details["type"] == "extra_forbidden" or not _is_union_branch(last)):
            key_path = (*key_path, last)
        if details["type"] == "key_error":
            key_path = (*key_path, details["ctx"]["key"])
        errors_of.setdefault(key_path, []).append(details)
    problems = []
    for key_path, errors_of_key in errors_of.items():
        # A missing key has no line, so its section's line is given.
        known = next((key_path[:n] for n in range(len(key_path), 0, -1) if key_path[:n] in locations), None)
        prefix = [
            _place_of_key(key_path, locations, path) if known is None else locations[known],
            ".".join(str(part) or "''" for part in key_path),
        ]
        problems.append(": ".join([*filter(None, prefix), _describe(errors_of_key, key_path)]))
    return problems


def _place_of_key(key_path: KeyPath, locations: Locations, path: str) -> str:
    """The place of a key that has none itself: that of the first key below it, or the file."""
    below = (place for other, place in locations.items() if key_path and other[: len(key_path)] == key_path)
    return next(below, path)


def _describe(errors: list[ErrorDetails], key_path: KeyPath) -> str:
    """The error of one key. A key with a union type has an error for each branch of the union."""
    first = errors[0]
    if first["type"] == "extra_forbidden":
        allowed = _keys_of(key_path[:-1])
        return f"unknown key{_suggestion(key_path, allowed) or '.'} Allowed here: {', '.join(allowed)}"
    if first["type"] == "missing":
        return "this key is missing"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "key_error":
        return first["msg"]
    messages = [details["msg"][0].lower() + details["msg"][1:] for details in errors]
    return f"{_shown(first['input'])} is not allowed: {', or '.join(messages)}"


def _suggestion(key_path: KeyPath, allowed: list[str]) -> str:
    """The key that an unknown one may stand for, as the end of a sentence; empty if there is none."""
    name = str(key_path[-1])
    if (name_here := _NAMES_ELSEWHERE.get(name, name)) in allowed:
        return f"; did you mean {name_here}?"
    # A key without its section.
    sections = [section for section in allowed if name_here in _keys_of((section,))] if len(key_path) == 1 else []
    if sections:
        return f"; did you mean {' or '.join(f'{section}.{name_here}' for section in sections)}?"
    return did_you_mean(name, allowed)


def _is_union_branch(part: str | int) -> bool:
    """True if a part of pydantic's location is a branch of a union, not a key: `constrained-int`, `literal['auto']`."""
    return isinstance(part, str) and (part in {"constrained-int", "constrained-str", "int", "bool"} or "[" in part)


def _keys_of(key_path: KeyPath) -> list[str]:
    """The keys that a section allows."""
    section: type[BaseModel] = Config
    for key in key_path:
        if isinstance(key, str):  # a number is the place in a list of sections
            section = next(_sections_in(section.model_fields[key].annotation))
    return list(section.model_fields)


def _shown(value: Any) -> str:
    """A value as an error shows it, shortened where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
