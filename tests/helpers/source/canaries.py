"""Fingerprints of what the package replaces or uses of libraries, compared with those that it was written for.

`python -m tests.helpers.source.canaries` stores the fingerprints of the installed versions in
tests/patches/canaries.json, beside those of other versions. Do it after you have looked at what has changed.
"""

import ast
import dataclasses
import functools
import hashlib
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from moreh.patches.catalog import declared
from moreh.patches.patch import Patch, original_of, resolve
from tests.helpers.source.library_internals import INTERNALS, WORDS
from tests.helpers.source.source_tree import ROOT

STORE = ROOT / "tests" / "patches" / "canaries.json"
COMMAND = "python -m tests.helpers.source.canaries"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")

Fingerprint = dict[str, str]
# Fingerprints by library and version, such as "torch 2.13", and by dotted name.
Store = dict[str, dict[str, Fingerprint]]


def names() -> dict[str, Patch | None]:
    """Every name that has a canary, with the patch that replaces it; None if the package only uses it.

    Python's own functions have none: they are documented and stay as they are.
    """
    patched: dict[str, Patch | None] = {
        target: patch
        for patch in declared()
        for target in patch.targets
        if target.partition(".")[0] not in sys.stdlib_module_names
    }
    return dict.fromkeys(INTERNALS) | patched


def fingerprints() -> dict[str, Fingerprint]:
    """The fingerprint of every name in the installed versions."""
    return {name: fingerprint(name) for name in names()}


def fingerprint(name: str) -> Fingerprint:
    """The signature of a name and the hash of its source, or what replaces them where it is not a Python function."""
    path, _, attribute = name.partition(":")
    if attribute:
        return {"signature": _instance_attribute(resolve(path), attribute), "source": ""}
    try:
        value = original_of(name)
    except (AttributeError, ImportError):
        return {"signature": "not there", "source": ""}
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    value = inspect.unwrap(value)
    if value is None:
        return {"signature": "not there", "source": ""}
    if inspect.isclass(value):
        return _of_class(value)
    if inspect.isfunction(value):
        return {"signature": _signature(value), "source": _hash(_source(value))}
    if callable(value) or inspect.isgetsetdescriptor(value):
        owner, _, function = name.rpartition(".")
        # The canary is the same whatever build of torch is installed.
        return _alternatives(owner).get(function) or _of_builtin(name, value)
    return {"signature": _of_data(value), "source": ""}


def _of_class(value: type) -> Fingerprint:
    """The bases of a class and its fields or the arguments of its constructor; the source of the constructor."""
    bases = ", ".join(base.__name__ for base in value.__bases__)
    methods = {name: member for name, member in sorted(vars(value).items()) if inspect.isfunction(member)}
    source = ""
    if dataclasses.is_dataclass(value):
        inside = ", ".join(field.name for field in dataclasses.fields(value))
    elif "__init__" in methods and not getattr(value, "_is_protocol", False):
        inside, source = _signature(methods["__init__"]), _source(methods["__init__"])
    else:
        own = [name for name, member in methods.items() if member.__module__ == value.__module__]
        inside = ", ".join(f"{name}{_signature(methods[name])}" for name in own)
    return {"signature": f"class {value.__name__}({bases}): {inside}", "source": _hash(source)}


@functools.cache
def _alternatives(module: str) -> dict[str, Fingerprint]:
    """The functions that a module defines in the `else` of a condition, as torch.cuda does in builds without CUDA."""
    source = _source(sys.modules.get(module))
    functions = [
        node
        for condition in ast.parse(source).body
        if isinstance(condition, ast.If)
        for node in condition.orelse
        if isinstance(node, ast.FunctionDef)
    ]
    fingerprints = {}
    for function in functions:
        lines = source.splitlines(keepends=True)[function.lineno - 1 : function.end_lineno]
        for argument in function.args.args:
            argument.annotation = None
        signature = f"({ast.unparse(function.args)})"
        fingerprints[function.name] = {"signature": signature, "source": _hash(textwrap.dedent("".join(lines)))}
    return fingerprints


def _of_builtin(name: str, value: Any) -> Fingerprint:
    """A record of a function in C: its documentation, and the schemas of the operator with its name."""
    import torch

    operator = f"aten::{name.rpartition('.')[2]}"
    schemas = sorted(str(schema) for schema in torch._C._jit_get_schemas_for_operator(operator))
    signature = schemas[0] if len(schemas) == 1 else f"{type(value).__name__} with {len(schemas)} schemas of {operator}"
    documentation = inspect.cleandoc(getattr(value, "__doc__", None) or "")
    return {"signature": signature, "source": _hash("\n".join([documentation, *schemas]))}


def _of_data(value: Any) -> str:
    """The type of a value that is not a function, and of its items or their names."""
    if isinstance(value, Mapping):
        kinds = sorted({f"{type(key).__name__}: {type(item).__name__}" for key, item in value.items()})
        return f"{type(value).__name__} of {', '.join(kinds)}"
    if isinstance(value, list | tuple | set | frozenset):
        return f"{type(value).__name__} of {', '.join(sorted(getattr(i, '__name__', repr(i)) for i in value))}"
    return type(value).__name__


def _instance_attribute(owner: type, attribute: str) -> str:
    """Where a class or its bases set an attribute of their instances."""
    setter = re.compile(rf"self\.{attribute}\b\s*(:[^=\n]+)?=[^=]|__setattr__\((self, )?\"{attribute}\"")
    methods = []
    for base in owner.__mro__:
        for name, member in vars(base).items():
            if inspect.isfunction(member) and setter.search(_source(member)):
                methods.append(f"{base.__name__}.{name}")
    return f"set in {', '.join(sorted(methods))}" if methods else "not there"


def _signature(function: Any) -> str:
    """The parameters of a function, without annotations, which Python versions write in different ways."""
    signature = inspect.signature(function)
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty, default=_Default.of(parameter.default))
        for parameter in signature.parameters.values()
    ]
    return str(inspect.Signature(bare))


@dataclasses.dataclass(frozen=True)
class _Default:
    """A default value that is shown without an address in memory, a module without its file."""

    text: str

    @staticmethod
    def of(value: Any) -> Any:
        if value is inspect.Parameter.empty:
            return value
        return _Default(value.__name__ if inspect.ismodule(value) else _ADDRESS.sub("", repr(value)))

    def __repr__(self) -> str:
        return self.text


def _source(function: Any) -> str:
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):  # in C, or made at run time
        return ""


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else ""


def library_of(name: str) -> str:
    """The library of a dotted name."""
    return name.split(".")[0]


def installed_version(library: str) -> tuple[int, int]:
    """The installed major and minor version of a library."""
    major, minor = re.match(r"(\d+)\.(\d+)", metadata.version(library)).groups()  # type: ignore[union-attr]
    return int(major), int(minor)


def nearest_version(store: Store, library: str, version: tuple[int, int]) -> tuple[int, int] | None:
    """The stored version of a library that is nearest to another one, the older of two; None if there is none."""
    stored = [tuple(map(int, key.split()[1].split("."))) for key in store if key.split()[0] == library]
    return min(stored, key=lambda s: (abs(s[0] - version[0]), abs(s[1] - version[1]), s), default=None)  # type: ignore


def changes(now: dict[str, Fingerprint], store: Store, versions: dict[str, tuple[int, int]]) -> dict[str, str]:
    """For each name whose fingerprint is not the stored one: what changed, who uses it and what to look at."""
    sentences = {}
    for name, current in now.items():
        library = library_of(name)
        nearest = nearest_version(store, library, versions[library])
        then = {} if nearest is None else store[_key(library, nearest)].get(name, {})
        if current != then:
            sentences[name] = _describe(name, then, current, nearest, versions[library])
    return sentences


def _describe(
    name: str, then: Fingerprint, now: Fingerprint, stored: tuple[int, int] | None, installed: tuple[int, int]
) -> str:
    library = library_of(name)
    versions = f"stored is {_key(library, stored) if stored else 'nothing'}, installed is {_key(library, installed)}"
    if not then:
        changed = [f"There is nothing to compare it with: it is new, with the signature {now['signature']}."]
    elif then["signature"] != now["signature"]:
        changed = [f"Its signature was  {then['signature']}", f"Its signature is   {now['signature']}"]
    else:
        changed = [f"Its source differs. Its signature is still {now['signature']}."]
    return "\n".join([*_what_uses(name), f"Versions: {versions}.", *changed, *_what_to_look_at(name)])


def _what_uses(name: str) -> list[str]:
    patch = names().get(name)
    if patch is not None:
        return [f"{name} is replaced in {patch.file}: {patch.why}"]
    return [f"{name} is used in {', '.join(users(name)) or 'no file'}: {INTERNALS.get(name, '')}"]


def _what_to_look_at(name: str) -> list[str]:
    try:
        file = inspect.getsourcefile(inspect.unwrap(original_of(name.partition(":")[0])))
        where = "" if file is None else f" in {Path(file).as_posix().rpartition('site-packages/')[2]}"
    except (AttributeError, ImportError, TypeError):
        where = ""
    return [f"Look at {name}{where}, and whether what is said above still holds. Then store it: {COMMAND}"]


def users(name: str) -> list[str]:
    """The files of the package in which the last part of a name, or the word for it, occurs."""
    word = re.compile(rf"\b{re.escape(WORDS.get(name) or re.split('[.:]', name)[-1])}\b")
    return [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "moreh").rglob("*.py"))
        if word.search(path.read_text(encoding="utf-8"))
    ]


def read_store() -> Store:
    """The stored fingerprints of all versions."""
    store: Store = json.loads(STORE.read_text(encoding="utf-8"))
    return store


def _key(library: str, version: tuple[int, int]) -> str:
    return f"{library} {version[0]}.{version[1]}"


def main() -> None:
    """Store the fingerprints of the installed versions."""
    store = read_store() if STORE.exists() else {}
    now = fingerprints()
    for library in sorted({library_of(name) for name in now}):
        of_library = {name: now[name] for name in sorted(now) if library_of(name) == library}
        store[_key(library, installed_version(library))] = of_library
    STORE.write_text(json.dumps(store, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"stored {len(now)} names in {STORE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
