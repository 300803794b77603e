"""Typed access to a model's config.json: key names, defaults and allowed values of its family.

This module imports neither torch nor transformers, which takes seconds: moreh-plan answers without them.
"""

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moreh.errors import PlanError

Default = int | float | bool | None

# Far more than any model has. A typing error must not fill the memory with layers.
_MAX_LAYERS = 10_000
_MAX_SIZE = 2**40

# Not of layers that are left out (layerdrop), nor of heads that no language model has.
_DROPOUT_KEY = re.compile(r"(?!classifier|summary|seq_classif|qa_)(?!.*layerdrop)\w*(dropout|pdrop|drop_rate)\w*")


def is_dropout_key(key: str) -> bool:
    """True if a key of a configuration is a dropout probability, in any family."""
    return _DROPOUT_KEY.fullmatch(key) is not None


def drops_elements(values: Mapping[str, Any]) -> bool:
    """True if any probability of dropout among the values of a configuration is not 0."""
    return any(
        is_dropout_key(key) and isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        for key, value in values.items()
    )


@dataclass(frozen=True)
class ConfigKeys:
    """The keys of a family's config.json that planning needs.

    tests/models/test_architecture.py compares all fields with the family's configuration class in transformers.
    """

    defaults: Mapping[str, Default]
    """The defaults of transformers for missing keys, by key; None if the value follows from other keys.

    A family without "head_dim" or "num_key_value_heads" here ignores such a key in its files, as transformers does.
    """
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Further names of keys, {alias: key}. If a file has both names, the alias counts."""
    renamed: Mapping[str, str | None] = field(default_factory=dict)
    """Keys that have another name in files of this family, {key: name}; None for a key that the family ignores."""

    def read(self, config: Mapping[str, Any], name: str) -> "HFConfig":
        """The values of `config`, the content of a config.json, with defaults for missing keys.

        `name` is for errors. No value is checked yet: each method of HFConfig checks the values that it reads.
        """
        file_keys = {key: renamed for key, renamed in self.renamed.items() if renamed is not None}
        ignored = self.renamed.keys() - file_keys.keys()
        values = {
            key: default if key in ignored else config.get(file_keys.get(key, key), default)
            for key, default in self.defaults.items()
        }
        for alias, key in self.aliases.items():
            # Files of Bloom that say hidden_size leave n_embed at null.
            if alias in config and (config[alias] is not None or key not in config):
                values[key] = config[alias]
                file_keys[key] = alias
        nullable = frozenset(key for key, default in self.defaults.items() if default is None)
        return HFConfig(name, config["model_type"], values, file_keys, nullable)


@dataclass(frozen=True)
class HFConfig:
    """The configuration of a model of a known family. Reading a value that is not allowed raises a PlanError."""

    name: str
    """The user's name for the configuration, such as a path. Errors begin with it."""
    family: str
    """The model type of transformers."""
    values: Mapping[str, Any]
    """The value of the file, or the default, by key of the family's ConfigKeys."""
    file_keys: Mapping[str, str]
    """The names in the file of those keys that have another name there."""
    nullable: frozenset[str]
    """The keys whose default is None: null in a file means the same."""

    def refuse(self, key: str, allowed: str) -> PlanError:
        """The error for the value of `key`, with the value and the allowed values."""
        shown = reprlib.repr(self.values[key])
        return PlanError(f"{self.name}: {self.file_keys.get(key, key)} is {shown}: give {allowed}")

    def size(self, key: str, maximum: int = _MAX_SIZE) -> int:
        """A whole number from 1 to `maximum`.

        Raises:
            PlanError: the value is anything else.
        """
        value = self.values[key]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
            limit = f" and at most {maximum}" if isinstance(value, int) else ""
            raise self.refuse(key, f"a whole number of at least 1{limit}")
        return value

    def optional_size(self, key: str) -> int | None:
        """Like `size`, but None where the family has no such key or lets it be null."""
        may_be_null = key in ("sliding_window", "num_key_value_heads") or key in self.nullable or key not in self.values
        return None if self.values.get(key) is None and may_be_null else self.size(key)

    def flag(self, key: str) -> bool:
        """True or false; null counts as false.

        Raises:
            PlanError: the value is anything else.
        """
        value = self.values[key]
        if value is not None and not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return bool(value)

    @property
    def has_dropout(self) -> bool:
        """True if any probability of dropout is above 0.

        Raises:
            PlanError: one of them is not a probability.
        """
        has_dropout = False
        for key, value in self.values.items():
            if not is_dropout_key(key):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float | None) or not 0 <= (value or 0) <= 1:
                raise self.refuse(key, "a probability from 0 to 1")
            has_dropout |= bool(value)
        return has_dropout

    @property
    def hidden(self) -> int:
        """Elements of a hidden state."""
        return self.size("hidden_size")

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.size("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        """Key-value heads: as many as query heads where the file gives none.

        Raises:
            PlanError: they do not divide the query heads.
        """
        kv_heads = self.optional_size("num_key_value_heads") or self.heads
        if self.heads % kv_heads:
            raise self.refuse("num_key_value_heads", f"a divisor of the {self.heads} attention heads")
        return kv_heads

    @property
    def even_head_dim(self) -> int:
        """The hidden size divided by the query heads.

        Raises:
            PlanError: the heads do not divide it.
        """
        if self.hidden % self.heads:
            raise self.refuse(
                "num_attention_heads", f"a divisor of the width, {self.hidden}, or give head_dim, if the family has it"
            )
        return self.hidden // self.heads

    @property
    def head_dim(self) -> int:
        """Elements of a head: head_dim where the file gives it, else `even_head_dim`."""
        return self.optional_size("head_dim") or self.even_head_dim

    @property
    def inner(self) -> int:
        """Inner elements of the feed-forward network: four times the hidden size where the file gives none."""
        return self.optional_size("intermediate_size") or 4 * self.hidden

    @property
    def layers(self) -> int:
        """The number of layers."""
        return self.size("num_hidden_layers", _MAX_LAYERS)

    def windows(self, sliding: tuple[bool, ...]) -> list[int | None]:
        """The attention window of each layer in positions, None for all positions.

        `sliding` says which layers have a window, unless the file says it with "layer_types".
        """
        window = self.optional_size("sliding_window")
        types = self.values.get("layer_types")
        if types is not None:
            is_list = isinstance(types, list) and all(isinstance(layer_type, str) for layer_type in types)
            if not is_list or len(types) != self.layers:
                raise self.refuse("layer_types", f"a list of {self.layers} names, one a layer")
            sliding = tuple(layer_type == "sliding_attention" for layer_type in types)
        return [window if slides else None for slides in sliding]
