"""moreh-smi device: list, add, remove and switch accelerators."""

import json

from moreh.accelerator.registry import add_accelerator, read_registry, remove_accelerator, select_accelerator
from moreh.accelerator.registry_content import Registry
from moreh.accelerator.this_machine import find_model
from moreh.cli.terminal import ask, print_models, selection_question
from moreh.errors import AcceleratorError
from moreh.tables import Column, draw_table


def list_devices(*, as_json: bool) -> None:
    """Print the accelerators, `*` at the current one."""
    registry = read_registry()
    if as_json:
        rows = [
            {"index": a.index, "current": a.index == registry.current, "model": a.flavor.name}
            for a in registry.accelerators
        ]
        print(json.dumps({"accelerators": rows}, indent=1))
    else:
        print(_draw_list(registry))


def add_device(model: str, *, ask_for_it: bool) -> str | None:
    """Add an accelerator; returns a sentence about it, or None if the user cancelled."""
    if ask_for_it:
        print_models(current=None)
        print()
        answer = ask(selection_question(), lambda entered: find_model(entered).name)
        if answer is None:
            return None
        model = answer
    added = add_accelerator(model)
    return f"Accelerator {added.index} ({added.flavor.name}) was added."


def remove_device(device: str, *, ask_for_it: bool) -> str | None:
    """Remove an accelerator; returns a sentence about it, or None if the user cancelled."""
    index = _ask_for_device("Device to remove") if ask_for_it else _index(device)
    if index is None:
        return None
    removed = remove_accelerator(index)
    return f"Accelerator {removed.index} ({removed.flavor.name}) was removed."


def switch_device(device: str, *, ask_for_it: bool) -> str | None:
    """Make an accelerator the current one; returns a sentence about it, or None if the user cancelled."""
    index = _ask_for_device("Device to switch to") if ask_for_it else _index(device)
    if index is None:
        return None
    selected = select_accelerator(index)
    return f"Accelerator {selected.index} ({selected.flavor.name}) is the current one now."


def _draw_list(registry: Registry) -> str:
    columns = [Column("Device", 6), Column("Name", 17, "right"), Column("Model", 11), Column("Total Memory", 12)]
    rows = [
        (
            f"{'*' if a.index == registry.current else ' '} {a.index}",
            "MoAI Accelerator",
            a.flavor.name,
            f"{a.flavor.memory_mib} MiB",
        )
        for a in registry.accelerators
    ]
    return draw_table(columns, rows)


def _ask_for_device(question: str) -> int | None:
    registry = read_registry()
    print(_draw_list(registry))
    indices = ", ".join(str(a.index) for a in registry.accelerators)
    answer = ask(f"{question} ({indices}, q, Q): ", lambda entered: str(registry.accelerator(_index(entered)).index))
    return None if answer is None else int(answer)


def _index(text: str) -> int:
    if not text.strip().isdecimal():
        raise AcceleratorError(f"no accelerator {text!r}: give an index that 'moreh-smi device --list' shows")
    return int(text)
