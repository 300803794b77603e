"""The architecture of a model from its Hugging Face configuration, for families that are planned without transformers.

It needs neither torch nor transformers, whose import takes seconds.
"""

from collections.abc import Mapping
from typing import Any

from moreh.errors import PlanError
from moreh.models.architecture import Architecture
from moreh.models.families import FAMILIES, planned_families


def architecture_from_config(config: Mapping[str, Any], name: str) -> Architecture:
    """The architecture of the model that transformers' AutoModelForCausalLM builds from `config`.

    `config` is the content of a config.json. A key that it leaves out has the default of transformers. `name` is for
    messages.

    Raises:
        PlanError: the family (`model_type`) is not one of `planned_families`, or a value is not allowed.
    """
    family = FAMILIES.get(model_type(config, name))
    if family is None or family.config_keys is None or family.architecture is None:
        known = ", ".join(planned_families())
        raise PlanError(f"{name}: model_type is {config['model_type']!r}: give one of {known}")
    return family.architecture(family.config_keys.read(config, name))


def model_type(config: Mapping[str, Any], name: str) -> str:
    """The family of a configuration.

    Raises:
        PlanError: the configuration has no `model_type`, or it is not text.
    """
    if "model_type" not in config:
        raise PlanError(
            f'{name}: there is no model_type: add it, such as "model_type": "llama", as in a config.json of Hugging '
            "Face"
        )
    family = config["model_type"]
    if not isinstance(family, str) or not family:
        raise PlanError(f'{name}: model_type is {family!r}: give the name of a family, such as "llama"')
    return family
