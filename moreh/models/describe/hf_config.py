"""Reads a model's configuration: defaults filled in, and every value that cannot be meant refused by its name."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moreh.errors import PlanError
from moreh.models.families.config_defaults import ALIASES, DEFAULTS, DROPOUT_KEYS, RENAMED

# Far more than any model has; a typing error must not fill the memory with layers.
_MAX_LAYERS = 10_000
_MAX_SIZE = 2**40


@dataclass(frozen=True)
class HFConfig:
    """The configuration of a model of a known family.

    `values` has each key of the family's table; `keys` gives what the file calls those that it gives.
    """

    name: str
    family: str
    values: Mapping[str, Any]
    keys: Mapping[str, str]

    def refuse(self, key: str, allowed: str) -> PlanError:
        """The error for the value of `key`: what it is and what is allowed instead."""
        return PlanError(f"{self.name}: {self.keys.get(key, key)} is {reprlib.repr(self.values[key])}: give {allowed}")

    def size(self, key: str, most: int = _MAX_SIZE) -> int:
        """A whole number of at least 1. Raises PlanError for anything else."""
        value = self.values[key]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise self.refuse(
                key, "a whole number of at least 1" + (f" and at most {most}" if isinstance(value, int) else "")
            )
        return value

    def optional_size(self, key: str) -> int | None:
        """The same, or None where the family knows no such key or lets it be null."""
        may_be_null = key in ("sliding_window", "num_key_value_heads") or DEFAULTS[self.family].get(key) is None
        return None if self.values.get(key) is None and may_be_null else self.size(key)

    def flag(self, key: str) -> bool:
        """True or false; null counts as false. Raises PlanError for anything else."""
        value = self.values[key]
        if value is not None and not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return bool(value)

    @property
    def has_dropout(self) -> bool:
        """Whether any probability of dropout is above 0. Raises PlanError for what is no probability."""
        found = False
        for key in DROPOUT_KEYS:
            value = self.values.get(key, 0.0)
            if isinstance(value, bool) or not isinstance(value, int | float | None) or not 0 <= (value or 0) <= 1:
                raise self.refuse(key, "a probability from 0 to 1")
            found |= bool(value)
        return found

    @property
    def hidden(self) -> int:
        """The width of the model."""
        return self.size("hidden_size")

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.size("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        """Key-value heads: as many as query heads where none are given. Raises PlanError if they do not divide those."""
        kv_heads = self.optional_size("num_key_value_heads") or self.heads
        if self.heads % kv_heads:
            raise self.refuse("num_key_value_heads", f"a divisor of the {self.heads} attention heads")
        return kv_heads

    @property
    def even_head_dim(self) -> int:
        """The width divided by the heads. Raises PlanError if they do not divide it."""
        if self.hidden % self.heads:
            raise self.refuse(
                "num_attention_heads", f"a divisor of the width, {self.hidden}, or give head_dim, if the family has it"
            )
        return self.hidden // self.heads

    @property
    def head_dim(self) -> int:
        """The width of a head: given, or the width of the model divided by the heads."""
        return self.optional_size("head_dim") or self.even_head_dim

    @property
    def inner(self) -> int:
        """The inner width of the feed-forward network, four times the model's where none is given."""
        return self.optional_size("intermediate_size") or 4 * self.hidden

    @property
    def layers(self) -> int:
        """The number of layers."""
        return self.size("num_hidden_layers", _MAX_LAYERS)

    def windows(self, sliding: tuple[bool, ...]) -> list[int | None]:
        """The attention window of each layer: `sliding` says which have one, unless the file has "layer_types"."""
        window = self.optional_size("sliding_window")
        types = self.values.get("layer_types")
        if types is not None:
            if (
                not isinstance(types, list)
                or len(types) != self.layers
                or not all(isinstance(kind, str) for kind in types)
            ):
                raise self.refuse("layer_types", f"a list of {self.layers} names, one a layer")
            sliding = tuple(kind == "sliding_attention" for kind in types)
        return [window if slides else None for slides in sliding]


def read_hf_config(config: Mapping[str, Any], name: str) -> HFConfig:
    """The settings of a configuration whose family, `config["model_type"]`, is in the table, with defaults for what is missing.

    Raises PlanError where a value cannot be meant.
    """
    family = config["model_type"]
    defaults = DEFAULTS[family]
    keys = {key: only for key, only in RENAMED.get(family, {}).items() if only is not None}
    ignored = RENAMED.get(family, {}).keys() - keys.keys()
    values = {
        key: default if key in ignored else config.get(keys.get(key, key), default) for key, default in defaults.items()
    }
    for alias, key in ALIASES.get(family, {}).items():
        # n_embed is left at null by files that say hidden_size.
        if alias in config and (config[alias] is not None or key not in config):
            values[key] = config[alias]
            keys[key] = alias
    return HFConfig(name, family, values, keys)
