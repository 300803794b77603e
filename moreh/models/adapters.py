"""The state of a model's PEFT adapters, which scripts switch for single calls: `disable_adapter`, `set_adapter`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# The attributes of PEFT's layers that say which adapters compute, and with what scaling.
_ATTRIBUTES = ("_disable_adapters", "_active_adapter", "scaling")


class AdapterState:
    """The adapters of a model that compute now, and their scaling; nothing for a model without adapters."""

    def __init__(self, root: nn.Module) -> None:
        layers = root.modules() if "peft" in sys.modules else ()
        self._layers = [(vars(layer), _attributes(vars(layer))) for layer in layers if _ATTRIBUTES[0] in vars(layer)]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """A block that computes with the adapters of this state; those of the script come back."""
        now = [(layer, _attributes(layer)) for layer, _ in self._layers]
        try:
            _set(self._layers)
            yield
        finally:
            _set(now)


def _attributes(layer: dict[str, Any]) -> dict[str, Any]:
    values = {name: layer[name] for name in _ATTRIBUTES if name in layer}
    # PEFT changes the scaling of an adapter in place.
    return {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}


def _set(layers: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for layer, values in layers:
        layer.update(values)
