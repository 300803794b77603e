"""The base class and the types of all settings sections."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError


def expand_home(name: str) -> str:
    """A path whose leading `~` is the user's home, as a shell reads it; a name without it as it is."""
    try:
        return str(Path(name).expanduser()) if name.startswith("~") else name
    except RuntimeError:  # there is no such user
        return name


def path_of(name: str) -> str:
    """A path or a name as it was written, from the user's home where it begins with `~/`.

    Raises:
        ValueError: it is blank, or a word that means "none" in YAML, in Python or in other programs' settings.
    """
    if not name.strip() or name.strip().lower() in {"~", "none"}:
        raise ValueError(
            f"{name!r} reads like no path at all: leave the key out, or write null where the key allows it; a path of "
            "that name begins with ./"
        )
    return expand_home(name)


NonEmpty = Annotated[str, StringConstraints(min_length=1)]
# A path, or a name on the hub.
PathText = Annotated[NonEmpty, AfterValidator(path_of)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of the settings. Unknown keys are refused, and values are not converted from other types."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def key_error(key: str, message: str) -> PydanticCustomError:
    """The error for one key below the field that is being validated."""
    return PydanticCustomError("key_error", "{message}", {"key": key, "message": message})
