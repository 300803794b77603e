"""A comparison of two runs of a script: reported values, how they end, printed lines and files.

Each function returns the differences as sentences, and none where there is none. A NaN equals a NaN and nothing else.
"""

import json
import math
import re

import torch

from tests.conformance.prelude import plain

NUMBER = re.compile(r"[-+]?\d+\.\d+(?:e[-+]?\d+)?")
# Numbers of rounding, such as the gradients of keys' biases, differ by as much as they are.
SMALLEST = 1e-8
# Such numbers stand in one container with others, of whose largest number this share counts as nothing.
SHARE = 0.01


def value_problems(expected, actual, tolerance):
    """Differences of the values that two runs have reported: lists of names and values."""
    names, others = [name for name, _ in expected], [name for name, _ in actual]
    if names != others:
        return [f"reports {others} instead of {names}"]
    problems = []
    for (name, value), (_, other) in zip(expected, actual, strict=True):
        problems += differences(name, value, other, tolerance, SHARE * _largest(value))
    return problems


def differences(name, expected, actual, tolerance, floor=0.0):
    """Differences of two values. Numbers up to `floor` count as nothing."""
    if isinstance(expected, bool) or isinstance(actual, bool) or expected is None or actual is None:
        return [] if expected is actual else [f"{name} is {_short(actual)} instead of {_short(expected)}"]
    if isinstance(expected, torch.Tensor) and isinstance(actual, torch.Tensor):
        return _tensor_differences(name, expected, actual, tolerance, floor)
    if isinstance(expected, int | float) and isinstance(actual, int | float):
        pair = (torch.tensor(number, dtype=torch.float64) for number in (expected, actual))
        return _tensor_differences(name, *pair, tolerance, floor)
    if isinstance(expected, dict) and isinstance(actual, dict):
        if list(expected) != list(actual):
            return [f"{name} has the keys {list(actual)[:8]} instead of {list(expected)[:8]}"]
        pairs = [(f"{name}[{key!r}]", expected[key], actual[key]) for key in expected]
    elif isinstance(expected, list) and isinstance(actual, list):
        if len(expected) != len(actual):
            return [f"{name} has {len(actual)} items instead of {len(expected)}"]
        pairs = [(f"{name}[{index}]", *pair) for index, pair in enumerate(zip(expected, actual, strict=True))]
    else:
        is_equal = type(expected) is type(actual) and expected == actual
        return [] if is_equal else [f"{name} is {_short(actual)} instead of {_short(expected)}"]
    return [problem for pair in pairs for problem in differences(*pair, tolerance, floor)]


def text_problems(name, expected, actual, tolerance):
    """Differences of two texts, line by line. Numbers with a point may differ by the tolerance or the last digit."""
    lines, others = expected.splitlines(), actual.splitlines()
    if len(lines) != len(others):
        return [f"{name} has {len(others)} lines instead of {len(lines)}: {_short(others)} instead of {_short(lines)}"]
    return [
        f"{name}, line {number}: {_short(other)} instead of {_short(line)}"
        for number, (line, other) in enumerate(zip(lines, others, strict=True), 1)
        if not _lines_agree(line, other, tolerance)
    ]


def file_problems(expected, actual, tolerance):
    """Differences of the files below two directories."""
    names, others = _files(expected), _files(actual)
    if names != others:
        return [f"the files are {others} instead of {names}"]
    return [problem for name in names for problem in _file_differences(name, expected / name, actual / name, tolerance)]


def _tensor_differences(name, expected, actual, tolerance, floor):
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        kinds = [f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (actual, expected)]
        return [f"{name} is {kinds[0]} instead of {kinds[1]}"]
    if not (expected.is_floating_point() or expected.is_complex()):
        unequal = int((expected != actual).sum())
        return [f"{name} differs in {unequal} of {expected.numel()} numbers"] if unequal else []
    expected, actual = expected.double().flatten(), actual.double().flatten()
    is_finite = expected.isfinite()
    same = torch.equal(is_finite, actual.isfinite()) and torch.equal(
        expected[~is_finite].nan_to_num(nan=0.5), actual[~is_finite].nan_to_num(nan=0.5)
    )
    if not same:
        return [f"{name}: {_short(actual)} instead of {_short(expected)}, not finite in different places"]
    expected, actual = expected[is_finite], actual[is_finite]
    if not len(expected):
        return []
    scale = max(float(expected.abs().max()), floor)
    difference = float((expected - actual).abs().max())
    if difference <= tolerance * scale + SMALLEST:
        return []
    where = int((expected - actual).abs().argmax())
    return [
        f"{name} differs by {difference / scale if scale else math.inf:.1e}: "
        f"{float(actual[where]):.8g} instead of {float(expected[where]):.8g}"
    ]


def _largest(value):
    """The largest absolute value of the numbers with a point in a container; 0 for anything else."""
    items = list(value.values()) if isinstance(value, dict) else value
    return max(map(_magnitude, items), default=0.0) if isinstance(items, list) else 0.0


def _magnitude(value):
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
        return float(value.abs().nan_to_num(0.0, 0.0, 0.0).max())
    if isinstance(value, float) and math.isfinite(value):
        return abs(value)
    return _largest(value)


def _lines_agree(line, other, tolerance):
    if NUMBER.split(line) != NUMBER.split(other):
        return False
    pairs = zip(NUMBER.findall(line), NUMBER.findall(other), strict=True)
    return all(
        abs(float(number) - float(theirs)) <= max(1.01 * _last_digit(number), tolerance * abs(float(number)))
        for number, theirs in pairs
    )


def _last_digit(number):
    """The value of a one at the last place of a number: 0.01 for 3.14."""
    digits, _, exponent = number.partition("e")
    return 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))


def _files(directory):
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def _file_differences(name, expected, actual, tolerance):
    pair = (expected, actual)
    if name.endswith(".safetensors"):
        from safetensors.torch import load_file

        values = [dict(sorted(load_file(path).items())) for path in pair]
    elif name.endswith((".pt", ".pth", ".bin", ".ckpt")):
        values = [plain(torch.load(path, weights_only=False), _type_name) for path in pair]
    elif name.endswith(".json"):
        try:
            values = [json.loads(path.read_text(encoding="utf-8")) for path in pair]
        except ValueError as error:
            return [f"{name} is not JSON: {error}"]
    else:
        try:
            texts = [path.read_text(encoding="utf-8") for path in pair]
        except UnicodeDecodeError:
            is_equal = expected.read_bytes() == actual.read_bytes()
            return [] if is_equal else [f"{name} has other bytes"]
        return text_problems(name, *texts, tolerance)
    return differences(name, *values, tolerance, SHARE * _largest(values[0]))


def _type_name(value):
    return type(value).__name__


def _short(value, length=100):
    text = value if isinstance(value, str) else repr(value.tolist() if isinstance(value, torch.Tensor) else value)
    return text if len(text) <= length else f"{text[:length]} ..."
