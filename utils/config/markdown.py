"""Generates docs/configuration.md and the list in --help from the declarations of the settings.

A test compares the page with `settings_markdown()`. `python -m utils.config > docs/configuration.md` renews the page.
"""

import json
import re
import textwrap
from typing import Any

from moreh.options import OPTIMIZATIONS
from utils.config.optimizers import optimizer_settings_markdown
from utils.config.schema import Config

_WIDTH = 120
_INTRODUCTION = """\
# Configuration

A training script reads its settings from a YAML file, `--config FILE`.
The command line overrides any setting with `section.key=value`:

```bash
python train_gpt.py --config configs/gpt.yaml --plan-only train.batch_size=32 accelerator.model=Large.256GB
```

The shortest file has a name, a model, data and the length of the training:

```yaml
run: {name: mine}
model: {architecture: {model_type: gpt2, n_layer: 2, n_embd: 64, n_head: 2}}
data: {docstrings: [stdlib]}
train: {steps: 100}
```

- Values are read as YAML 1.2: `010` is ten, and `yes` is a string.
- On the command line, the value of a string key is taken literally, line breaks and `#` included.
  Quotes around the whole value are read as in YAML.
- A path may begin with `~`.
- A list with one name may be written as the name: `data.files=pairs.jsonl`.
- Some keys exclude each other, such as `data.files` and `data.docstrings`.
  Such a key on the command line replaces the other key in the file.
- An unknown key or an invalid value is an error that names the file and the line.
  All errors in a file are reported at once.
- `config.yaml` in the run's directory has all settings of the run, defaults included.

`python -m utils.config` generates this page from `utils/config/schema.py` and `moreh/options.py`.
"""


def settings_markdown() -> str:
    """The page docs/configuration.md."""
    schema = Config.model_json_schema()
    parts = [_INTRODUCTION]
    for name, reference in schema["properties"].items():
        parts += _section(name, _resolved(reference, schema), schema)
    return "\n".join(parts)


def settings_help(width: int) -> str:
    """The keys of all settings with type, default and the first sentence of their meaning, for --help."""
    lines = ["settings, in the file or as SECTION.KEY=VALUE (more in docs/configuration.md):"]
    for item in re.findall(r"^- \*\*`(\S+)`\*\*: (.*\n(?:  .*\n)*)", settings_markdown(), re.M):
        first, *others = re.split(r"(?<=\.) (?=[A-Z`])", " ".join(item[1].replace("`", "").split()))
        text = " ".join([f"{item[0]}: {first}", *others[:1]])
        lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)
    return "\n".join(lines)


def _section(path: str, section: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """A heading, a line for the section, an item for each key, and the sections below."""
    parts = [f"## `{path}`\n\n{section['description']}\n"]
    items, below = [], []
    for key, field in section["properties"].items():
        nested = next((_resolved(branch, schema) for branch in field.get("anyOf", []) if "$ref" in branch), None)
        if nested is not None:
            below += _section(f"{path}.{key}", nested, schema)
        for branch in field.get("anyOf", []):
            if "$ref" in branch.get("items", {}):
                below += _item_section(f"{path}.{key}[]", _resolved(branch["items"], schema), section, schema)
        default = "required" if key in section.get("required", []) else f"default {_default_text(field, nested)}"
        items.append(_item(f"{path}.{key}", f"{_type_text(field)}; {default}.", field["description"]))
        if key == "disable":
            below += [_optimizations()]
        if key == "optimizer_settings":
            below += [optimizer_settings_markdown()]
    return [*parts, "\n".join(items) + "\n", *below]


def _item_section(path: str, item: dict[str, Any], section: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """The section of an item of a list: the keys that it has in common with the section of the list are only named."""
    common = [f"`{key}`" for key in item["properties"] if key in section["properties"]]
    description = f"{item['description']}\nThese keys work as in `data`: {', '.join(common)}."
    own = {key: field for key, field in item["properties"].items() if key not in section["properties"]}
    lines = "\n".join(line for text in description.splitlines() for line in textwrap.wrap(text, _WIDTH))
    return _section(path, {**item, "description": lines, "properties": own}, schema)


def _item(name: str, first_sentence: str, description: str) -> str:
    lines = [f"- **`{name}`**: {first_sentence}"]
    for sentence in re.split(r"(?<=\.) (?=[A-Z`])", " ".join(description.split())):
        lines += textwrap.wrap(sentence, _WIDTH - 2, break_long_words=False, break_on_hyphens=False)
    return "\n  ".join(lines)


def _optimizations() -> str:
    return "Names for `disable`:\n\n" + "\n".join(_optimization(*item) for item in OPTIMIZATIONS.items()) + "\n"


def _optimization(name: str, description: str) -> str:
    first, *others = re.split(r"(?<=\.) (?=[A-Z`])", description)
    lines = textwrap.wrap(f"- `{name}`: {first}", _WIDTH, break_on_hyphens=False)
    for sentence in others:
        lines += textwrap.wrap(sentence, _WIDTH - 2, break_on_hyphens=False)
    return "\n  ".join(lines)


def _resolved(reference: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    definition: dict[str, Any] = schema["$defs"][reference["$ref"].rpartition("/")[2]]
    return definition


def _default_text(field: dict[str, Any], nested: dict[str, Any] | None) -> str:
    """A default as it would be written in YAML."""
    default = field["default"]
    if nested is not None and default is not None:
        return "`{}`"
    return "null" if default is None else f"`{default if isinstance(default, str) else json.dumps(default)}`"


def _type_text(field: dict[str, Any]) -> str:
    """A type in words, such as "integer from 1, or null"."""
    if "anyOf" in field:
        *others, last = (_type_text(branch) for branch in field["anyOf"])
        needs_comma = len(others) > 1 or " or " in others[0]
        return f"{', '.join(others)}{',' if needs_comma else ''} or {last}"
    if "$ref" in field:
        return "a section with the keys below"
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        *others, last = (f"`{value}`" for value in field["enum"])
        return f"{', '.join(others)} or {last}"
    if "pattern" in field:
        return f"string that matches `{field['pattern']}`"
    if field["type"] == "array":
        if "$ref" in field["items"]:
            return "list of sections with the keys below"
        return "list of names" if "enum" in field["items"] else "list of strings"
    words = {
        "boolean": "true or false",
        "integer": "integer",
        "number": "number",
        "string": "string",
        "object": "mapping",
        "null": "null",
    }
    return words[field["type"]] + _bounds_text(field)


def _bounds_text(field: dict[str, Any]) -> str:
    """The range of a number, such as " from 0 to 1" or " above 0"; empty if it has none."""
    text = f" from {field['minimum']:g}" if "minimum" in field else ""
    text += f" above {field['exclusiveMinimum']:g}" if "exclusiveMinimum" in field else ""
    text += f" to {field['maximum']:,}" if "maximum" in field else ""
    if "exclusiveMaximum" not in field:
        return text
    limit = field["exclusiveMaximum"]
    return f"{text} to {limit - 1}" if field["type"] == "integer" else f"{text}, below {limit:g}"
