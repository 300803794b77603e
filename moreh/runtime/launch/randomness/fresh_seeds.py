"""Seeds of generators that a script makes without one: the same number on every worker instead of the system's.

    rng = np.random.default_rng()  # rng draws the same order of rows on every worker
    random.seed()                  # likewise, and random.Random(), np.random.RandomState(), torch.seed()

Only calls from the script's own files count. A library may ask for seeds in one worker alone, or need different ones,
as `tempfile` for its names.
"""

import functools
import hashlib
import os
import sys
import threading
from collections import Counter
from types import FrameType
from typing import Any

import torch

from moreh.patches.cuda.caller_origin import is_user_file
from moreh.patches.several_workers.fresh_seeds import install_fresh_seeds

_SEED_BITS = 62


class FreshSeeds:
    """Numbers that agree on all workers: of one line of the script, its first number, its second, and so on."""

    def __init__(self, root: bytes) -> None:
        """`root` is the same on all workers and different in each run."""
        self._root = root
        self._pid = os.getpid()
        # How often each line has asked. A line that only one worker reaches does not change the numbers of the others.
        self._asked: Counter[tuple[str, int]] = Counter()
        self._lock = threading.Lock()

    def bits(self, count: int, frame: FrameType | None) -> int | None:
        """A number of `count` bits for the code that a frame runs; None if the caller is to ask the system.

        It is None for libraries and for processes that the script has started, each of which needs its own number. A
        worker of a DataLoader has its own number that agrees with those of the same worker on all ranks.
        """
        if frame is None or not is_user_file(frame.f_code.co_filename):
            return None
        worker = torch.utils.data.get_worker_info()
        if worker is None and os.getpid() != self._pid:
            return None
        line = (frame.f_code.co_filename, frame.f_lineno)
        with self._lock:
            self._asked[line] += 1
            text = f"{line} {self._asked[line]} {None if worker is None else worker.seed}"
        digest = hashlib.shake_256(self._root + text.encode()).digest((count + 7) // 8)
        return int.from_bytes(digest, "little") & ((1 << count) - 1)


def agree_on_fresh_seeds(root: bytes) -> None:
    """Let generators without a seed agree on all workers from now on. Call it once in each worker."""
    seeds = FreshSeeds(root)
    has_numpy = "numpy" in sys.modules or _can_import_numpy()
    install_fresh_seeds(
        functools.partial(_make_bits, seeds) if has_numpy else None,
        functools.partial(_make_class_seed, seeds),
        functools.partial(_make_module_seed, seeds),
        functools.partial(_make_torch_seed, seeds),
    )


def _can_import_numpy() -> bool:
    try:
        import numpy  # noqa: F401
    except ImportError:  # torch works without it
        return False
    return True


def _make_bits(seeds: FreshSeeds, original: Any) -> Any:
    def randbits(k: int) -> int:
        # Compiled code of NumPy has no frame.
        bits = seeds.bits(k, sys._getframe(1))
        return original(k) if bits is None else bits

    return randbits


def _make_class_seed(seeds: FreshSeeds, original: Any) -> Any:
    @functools.wraps(original)
    def seed(self: Any, a: Any = None, version: int = 2) -> None:
        original(self, _seed_or_fresh(seeds, a), version)

    return seed


def _make_module_seed(seeds: FreshSeeds, original: Any) -> Any:
    @functools.wraps(original)
    def seed(a: Any = None, version: int = 2) -> None:
        original(_seed_or_fresh(seeds, a), version)

    return seed


def _seed_or_fresh(seeds: FreshSeeds, a: Any) -> Any:
    """A seed for Python's random: the one given, else a fresh one, else None."""
    if a is not None:
        return a
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") == "random":  # `__init__` of random.Random
        frame = frame.f_back
    return seeds.bits(_SEED_BITS, frame)


def _make_torch_seed(seeds: FreshSeeds, original: Any) -> Any:
    @functools.wraps(original)
    def seed() -> int:
        number = seeds.bits(_SEED_BITS, sys._getframe(1))
        if number is None:
            return int(original())
        torch.manual_seed(number)
        return number

    return seed
