"""The settings section `accelerator.advanced_parallelization`, generated from moreh/options.py."""

import dataclasses
from typing import Any, Literal

from pydantic import Field, create_model, model_validator
from typing_extensions import Self

from moreh import options
from moreh.options import Auto
from utils.config.section import Positive, Section

# What the hook's options allow, as types of pydantic.
_TYPES: dict[str, Any] = {
    options.SWITCH: bool,
    options.SWITCH_OR_AUTO: bool | Auto,
    options.COUNT_OR_AUTO: Positive | Auto,
    options.NAMES: list[Literal[tuple(options.OPTIMIZATIONS)]],  # type: ignore[misc]
}


def _field_of(option: dataclasses.Field[Any]) -> tuple[Any, Any]:
    default = list(option.default) if isinstance(option.default, tuple) else option.default
    return _TYPES[option.metadata["allowed"]], Field(default, description=option.metadata["doc"])


_FIELDS: dict[str, Any] = {option.name: _field_of(option) for option in dataclasses.fields(options.ParallelOptions)}
_Options: Any = create_model("_Options", __base__=Section, **_FIELDS)


class ParallelizationSection(_Options):  # type: ignore[misc]
    """The options of `torch.moreh.option.enable_advanced_parallelization`; null trains as if it were not called."""

    def parallel_options(self) -> options.ParallelOptions:
        """The options as the hook takes them."""
        return options.parse_options(self.model_dump())

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        self.parallel_options()  # its OptionError is a ValueError
        return self
