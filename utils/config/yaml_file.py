"""Reads the settings of a run from a YAML file and the command line; all problems are reported at once, with their lines."""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from moreh.options import did_you_mean
from utils.config.schema import Config
from utils.errors import UserError

# The place of each key: ("train", "lr") -> "configs/gpt.yaml:12" or "command line".
Places = dict[tuple[str | int, ...], str]


def load_config(path: str, overrides: list[str]) -> Config:
    """The checked settings of the file, changed by overrides such as `train.lr=1e-4`.

    Raises:
        UserError: with one line for each problem.
    """
    content, places = _read_yaml(path)
    problems = [problem for text in overrides if (problem := _apply_override(content, places, text)) is not None]
    if problems:
        raise UserError(problems)
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise UserError(_describe_all(error.errors(), places, path)) from None


def save_config(config: Config, path: Path) -> None:
    """Write all settings, defaults included, as a YAML file that `load_config` reads."""
    path.write_text(yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False), encoding="utf-8")


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as in YAML 1.2 (PyYAML follows 1.1, where it is a text)."""


class _Dumper(yaml.SafeDumper):
    """Puts quotes around texts that this loader would read as numbers."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def _read_yaml(path: str) -> tuple[dict[str, Any], Places]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        places: Places = {}
        problems = [] if node is None else _record_places(node, (), path, places)
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
    return content, places


def _record_places(node: yaml.Node, key: tuple[str | int, ...], path: str, places: Places) -> list[str]:
    """Note the line of every key below `node`; returns a problem for each key that is written twice."""
    problems = []
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                problems.append(f"{path}:{key_node.start_mark.line + 1}: a key must be a word, not a list or a mapping")
                continue
            name, line = key_node.value, key_node.start_mark.line + 1
            if name in seen:
                dotted = ".".join(map(str, (*key, name)))
                problems.append(f"{path}:{line}: {dotted}: this key is already given in line {seen[name]}")
            seen[name] = line
            below = (*key, name)
            places[below] = f"{path}:{line}"
            problems += _record_places(value_node, below, path, places)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            element = (*key, index)
            places[element] = f"{path}:{item.start_mark.line + 1}"
            problems += _record_places(item, element, path, places)
    return problems


def _apply_override(content: dict[str, Any], places: Places, text: str) -> str | None:
    """Set one `section.key=value` in `content`; returns the problem if it cannot be done."""
    dotted, equals, value_text = text.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        return f"command line: {text!r} is not a setting: write section.key=value, for example train.lr=1e-4"
    try:
        value = yaml.load(value_text, Loader=_Loader)
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
    for place in [known for known in places if known[: len(keys)] == tuple(keys)]:
        del places[place]  # what stood below the key in the file is replaced as a whole
    places[tuple(keys)] = "command line"
    return None


def _describe_all(errors: list[ErrorDetails], places: Places, path: str) -> list[str]:
    """One line for each problem: place, key, what was given and what is allowed."""
    by_location: dict[tuple[str | int, ...], list[ErrorDetails]] = {}
    for details in errors:
        *sections, last = details["loc"] or ("",)
        location = tuple(part for part in sections if not _is_union_branch(part))
        if last != "" and (details["type"] == "extra_forbidden" or not _is_union_branch(last)):
            location = (*location, last)
        if details["type"] == "problem_of_key":
            location = (*location, details["ctx"]["key"])
        by_location.setdefault(location, []).append(details)
    problems = []
    for location, same_place in by_location.items():
        place = next((places[location[:n]] for n in range(len(location), 0, -1) if location[:n] in places), path)
        dotted = ".".join(map(str, location))
        problems.append(f"{place}: {dotted}: " if dotted else f"{place}: ")
        problems[-1] += _describe(same_place, location)
    return problems


def _describe(same_place: list[ErrorDetails], location: tuple[str | int, ...]) -> str:
    """What is wrong with one key. Several errors are the branches of a union, none of which fits."""
    first = same_place[0]
    if first["type"] == "extra_forbidden":
        allowed = _keys_of(location[:-1])
        return f"unknown key{did_you_mean(str(location[-1]), allowed) or '.'} Allowed here: {', '.join(allowed)}"
    if first["type"] == "missing":
        return "this key is missing"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "problem_of_key":
        return first["msg"]
    messages = [details["msg"][0].lower() + details["msg"][1:] for details in same_place]
    return f"{_shown(first['input'])} is not allowed: {', or '.join(messages)}"


def _is_union_branch(part: str | int) -> bool:
    """pydantic names the branch of a union, such as `constrained-int` or `literal['auto']`, as if it were a key."""
    return isinstance(part, str) and (part in {"constrained-int", "int", "bool"} or "[" in part)


def _keys_of(location: tuple[str | int, ...]) -> list[str]:
    """The keys that the section at this location allows."""
    section: type[BaseModel] = Config
    for part in location:
        annotation: Any = section.model_fields[str(part)].annotation
        branches = [annotation, *getattr(annotation, "__args__", ())]
        section = next(b for b in branches if isinstance(b, type) and issubclass(b, BaseModel))
    return list(section.model_fields)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
