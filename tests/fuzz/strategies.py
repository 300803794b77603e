"""What fuzzers draw: values of JSON and YAML, and damages of bytes."""

import json
from typing import Any

from hypothesis import strategies as st

NUMBERS = (
    st.sampled_from([0, -1, 1, 2, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan")])
    | st.integers()
    | st.floats()
)
TEXTS = st.sampled_from(
    ["", " ", "\0", "\n", "null", "~", "yes", "1e3", "0x1f", "{", "}", "{prompt}", "../x", "!!python", "é"]
) | st.text(max_size=20)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=8
)


@st.composite
def changed_json(draw: st.DrawFn, content: Any) -> Any:
    """A value of JSON with some of its parts replaced, removed, repeated or added."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        parent: Any = None
        place: Any = content
        key: Any = None
        while isinstance(place, dict | list) and place and draw(st.integers(0, 3)):
            parent = place
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            place = place[key]
        action = draw(st.sampled_from(["replace", "remove", "add", "repeat"]))
        if parent is None:
            if action == "replace" and not draw(st.integers(0, 9)):
                return draw(VALUES)
        elif action == "replace":
            parent[key] = draw(VALUES)
        elif action == "remove":
            del parent[key]
        elif action == "add" and isinstance(parent, dict):
            parent[draw(TEXTS)] = draw(VALUES)
        elif isinstance(parent, list):
            parent.append(parent[key])
    return content


@st.composite
def damaged(draw: st.DrawFn, content: bytes, others: tuple[bytes, ...] = ()) -> bytes:
    """Bytes with a bit flipped, cut, repeated, filled or exchanged with others; never the same."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["flip", "flip", "flip", "cut", "insert", "zero", "repeat", "swap"]))
        place = draw(st.integers(0, max(len(changed) - 1, 0)))
        if kind == "flip" and changed:
            changed[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del changed[place:]
        elif kind == "insert":
            changed[place:place] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "zero":
            changed[place : place + 16] = bytes(len(changed[place : place + 16]))
        elif kind == "repeat":
            changed += changed[place:]
        elif kind == "swap" and others:
            changed = bytearray(draw(st.sampled_from(others)))
    return bytes(changed) if changed != content else content + b"\0"
