"""Makes PyYAML, which follows YAML 1.1, read numbers and words as YAML 1.2.

There `010` is 8, `1:30` is 90, `yes` is true, and `1e-4` is text. A number that is not one of YAML 1.2 is text here,
which a setting that takes a number refuses.
"""

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_RESOLVERS = {
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    "int": (re.compile(r"^(?:[-+]?[0-9]+|0x[0-9a-fA-F]+)$"), "-+0123456789"),
    "float": (
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+.0123456789",
    ),
}


class Loader(yaml.SafeLoader):
    """Loads numbers and words as YAML 1.2 does, and pairs of escaped surrogates as JSON does: as one character."""

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        """A scalar; PyYAML calls this method.

        Raises:
            yaml.MarkedYAMLError: it has half of a pair, which is not a character.
        """
        node: yaml.ScalarNode = super().compose_scalar_node(anchor)
        if not node.value.isascii():
            try:
                node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                problem = "an escape is half of a surrogate pair, which is not a character"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None
        return node


class Dumper(yaml.SafeDumper):
    """Quotes text that either version would read as something else."""


def _construct_int(loader: Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 16 if text.startswith("0x") else 10)


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.removeprefix(_TAG) not in _RESOLVERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_constructor(_TAG + "int", _construct_int)
for _name, (_pattern, _first) in _RESOLVERS.items():
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(_TAG + _name, _pattern, list(_first))
