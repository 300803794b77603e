"""Detects changes to the structure of a sharded model, which would have no effect."""

from typing import Any

from torch import nn

from moreh.errors import OptionError
from moreh.models.introspection import unwrapped, wrappers
from moreh.models.provenance import is_accelerate_bf16_forward

# Of each module by its name: the module, its parameters by name, and a `forward` of the object's own, by their ids.
Structure = dict[str, tuple[int, dict[str, int], int | None]]


def structure_of(root: nn.Module) -> Structure:
    """The modules and parameters of a model."""
    outer = {id(module) for module in (*wrappers(root), unwrapped(root))}
    return {
        name: (
            id(module),
            {key: id(parameter) for key, parameter in module._parameters.items() if parameter is not None},
            _own_forward(module, is_outer=id(module) in outer),
        )
        for name, module in root.named_modules()
    }


def check_structure(root: nn.Module, expected: Structure) -> None:
    """Check that a script has changed nothing in a model since it was sharded.

    Raises:
        OptionError: it has put in, taken out or replaced a module, a parameter or a forward pass.
    """
    actual = structure_of(root)
    if actual == expected:
        return
    name = next(name for name in (*actual, *expected) if actual.get(name) != expected.get(name))
    if name not in expected:
        what = f"{name} was put into"
    elif name not in actual:
        what = f"{name} was taken out of"
    elif actual[name][0] != expected[name][0]:
        what = f"{name} was replaced in"
    elif actual[name][2] != expected[name][2]:
        what = f"the forward pass of {name or 'the whole model'} was replaced in"
    else:
        before, after = expected[name][1], actual[name][1]
        keys = [key for key in (*after, *before) if before.get(key) != after.get(key)]
        what = f"the parameter {'.'.join(filter(None, (name, keys[0])))} was put into, taken out of or replaced in"
    raise OptionError(
        f"{what} the model after it was sharded over workers, where it would be ignored: change the model before its "
        "first training step, or save it with save_pretrained and load that, or run on 1 worker (MOREH_WORKERS=1)"
    )


def _own_forward(module: Any, *, is_outer: bool) -> int | None:
    forward = module.__dict__.get("forward")
    if forward is None or (is_outer and is_accelerate_bf16_forward(module)):
        return None
    return id(forward)
