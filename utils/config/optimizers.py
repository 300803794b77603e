"""The optimizers that `train.optimizer` names, with the settings of each.

torch is not imported here, so that a wrong key is an error within a second. A test compares the keys with the
signatures of torch's classes.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from moreh.options import did_you_mean
from utils.config.section import key_error

_Fraction = Annotated[float, Field(strict=True, ge=0, lt=1)]
_NotNegative = Annotated[float, Field(strict=True, ge=0)]
_Switch = Annotated[bool, Field(strict=True)]
_Betas = Annotated[list[_Fraction], Field(min_length=2, max_length=2)]
_Count = Annotated[int, Field(strict=True, ge=1, lt=100)]


@dataclass(frozen=True)
class OptimizerKind:
    """One of torch's optimizers."""

    class_name: str
    """The class in `torch.optim`."""
    settings: dict[str, Any]
    """The types of its settings, by the names of its arguments."""
    defaults: dict[str, Any]
    """Settings whose default here is not torch's."""


def _kind(class_name: str, settings: dict[str, Any], defaults: dict[str, Any] | None = None) -> OptimizerKind:
    return OptimizerKind(class_name, settings, defaults or {})


_ADAM = {"betas": _Betas, "eps": _NotNegative}
_ADAMW = {**_ADAM, "amsgrad": _Switch}
_MUON = {
    "momentum": _Fraction,
    "nesterov": _Switch,
    "ns_coefficients": Annotated[list[float], Field(min_length=3, max_length=3)],
    "eps": _NotNegative,
    "ns_steps": _Count,
    "adjust_lr_fn": str,
}

# Of the others, Adagrad, Adadelta and Adamax are no longer used for language models, ASGD and Rprop are for whole data
# sets, SparseAdam is for sparse gradients, and LBFGS needs a closure.
OPTIMIZERS = {
    "adamw": _kind("AdamW", _ADAMW),
    "adam": _kind("Adam", {**_ADAMW, "decoupled_weight_decay": _Switch}),
    "nadam": _kind("NAdam", {**_ADAM, "momentum_decay": _NotNegative, "decoupled_weight_decay": _Switch}),
    "radam": _kind("RAdam", {**_ADAM, "decoupled_weight_decay": _Switch}),
    "adafactor": _kind(
        "Adafactor",
        {
            "beta2_decay": Annotated[float, Field(strict=True, le=0)],
            "eps": Annotated[list[_NotNegative | None], Field(min_length=2, max_length=2)],
            "d": Annotated[float, Field(strict=True, ge=1)],
        },
    ),
    # With one learning rate for Muon's matrices and AdamW's tensors, updates of both have to be of one size.
    "muon": _kind("Muon", _MUON, {"adjust_lr_fn": "match_rms_adamw"}),
    "sgd": _kind("SGD", {"momentum": _Fraction, "dampening": _Fraction, "nesterov": _Switch}),
    "rmsprop": _kind("RMSprop", {"alpha": _Fraction, "eps": _NotNegative, "momentum": _Fraction, "centered": _Switch}),
}
# Settings of the AdamW beside Muon, below the key `adamw`.
ADAMW_BESIDE_MUON = {**_ADAMW, "lr": Annotated[float, Field(strict=True, gt=0)]}


def check_optimizer_settings(name: str, settings: dict[str, Any]) -> None:
    """Refuse settings that an optimizer does not have, and values that they cannot have.

    Raises:
        PydanticCustomError: an unknown setting, or a value that is not allowed.
    """
    types = OPTIMIZERS[name].settings
    if name != "muon":
        return _check(name, types, settings)
    _check(name, {**types, "adamw": dict[str, Any]}, settings)
    _check("the adamw beside muon", ADAMW_BESIDE_MUON, settings.get("adamw", {}))
    allowed = ("original", "match_rms_adamw")
    if settings.get("adjust_lr_fn", allowed[0]) not in allowed:
        raise key_error(
            "adjust_lr_fn", f"{settings['adjust_lr_fn']!r} is not allowed: choose one of {', '.join(allowed)}"
        )
    return None


def _check(owner: str, types: dict[str, Any], settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        if key not in types:
            raise key_error(
                key,
                f"{owner} has no such setting{did_you_mean(key, types) or '.'} Allowed here: {', '.join(types)}",
            )
        try:
            TypeAdapter(types[key]).validate_python(value)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise key_error(key, f"{value!r} is not allowed: {message[0].lower()}{message[1:]}") from None


def optimizer_settings_markdown() -> str:
    """The part of docs/configuration.md about the settings of each optimizer."""
    lines = ["Keys of `optimizer_settings`, with the defaults and meanings of the class in `torch.optim`:", ""]
    for name, kind in OPTIMIZERS.items():
        keys = ", ".join(f"`{key}`" for key in kind.settings)
        lines.append(f"- `{name}` ({kind.class_name}): {keys}.")
        if name == "muon":
            lines += [
                "  It updates the matrices of the layers.",
                "  AdamW updates all other parameters: embeddings, output layer, norms and biases.",
                "  The default of `adjust_lr_fn` is `match_rms_adamw`, so that both use one `lr`.",
                f"  The key `adamw` holds settings of AdamW: {', '.join(f'`{key}`' for key in ADAMW_BESIDE_MUON)}.",
            ]
    return "\n".join(lines) + "\n"
