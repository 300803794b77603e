"""Equal calls of several workers that run one script, of which one counts for all."""

import contextlib
import os
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import DistStoreError

# How long a worker may take for a call that it has begun, before the others do without its result.
TIMEOUT = timedelta(hours=1)
DONE = "done"


class SharedCalls:
    """Equal calls of several workers: a store that they have in common, and how often this worker has called."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._calls: Counter[str] = Counter()
        self._pid = os.getpid()

    def are_here(self) -> bool:
        """True if this is the worker's own process: one that it has forked must not use its connection."""
        return os.getpid() == self._pid

    def first(self, key: str, call: Callable[[], Any]) -> str | None:
        """Make the call on the worker that comes first, and wait for it on the others.

        Returns None on the first one. On the others `DONE`, or the error that the first one had: its number if it is
        one of the operating system, else its text.
        """
        name = self._name(key)
        if self._store.add(name, 1) == 1:
            self._make(name, call)
            return None
        return self._outcome(name)

    def together(self, key: str, call: Callable[[], Any], workers: int, patience: timedelta) -> str | None:
        """Make the call on the last worker that arrives; returns the result of `first`.

        After `patience`, the first one goes ahead without those that have not come.
        """
        name = self._name(key)
        number = self._store.add(name, 1)
        if number == workers and self._begins(name):
            self._make(name, call)
            return None
        if number == 1:
            try:
                self._store.wait([f"{name}/outcome"], patience)
            except DistStoreError:
                if self._begins(name):
                    self._make(name, call)
                    return None
        return self._outcome(name)

    def count(self, key: str) -> int:
        """How often this worker has made a call."""
        return self._calls[key]

    def number(self, event: str) -> int:
        """1 for the worker that comes to an event first, 2 for the next one."""
        return int(self._store.add(f"moreh-files/{event}", 1))

    def announce(self, event: str) -> None:
        """Tell all workers that something has happened."""
        if self.are_here():
            self._store.set(f"moreh-files/{event}", "")

    def has(self, event: str) -> bool:
        """True if a worker has announced an event."""
        return bool(self._store.check([f"moreh-files/{event}"]))

    def wait_for(self, event: str, patience: timedelta) -> None:
        """Wait until a worker has announced an event, at most for `patience`."""
        if self.are_here():
            with contextlib.suppress(DistStoreError):
                self._store.wait([f"moreh-files/{event}"], patience)

    def _name(self, key: str) -> str:
        name = f"moreh-files/{key}/{self._calls[key]}"
        self._calls[key] += 1
        return name

    def _begins(self, name: str) -> bool:
        """True if no other worker makes the call, or has made it."""
        return bool(self._store.add(f"{name}/makers", 1) == 1)

    def _make(self, name: str, call: Callable[[], Any]) -> None:
        outcome = "interrupted"
        try:
            call()
            outcome = DONE
        except Exception as error:
            number = getattr(error, "errno", None)
            outcome = f"{number}" if isinstance(error, OSError) and number else f"{type(error).__name__}: {error}"
            raise
        finally:
            self._store.set(f"{name}/outcome", outcome)

    def _outcome(self, name: str) -> str:
        self._store.wait([f"{name}/outcome"], TIMEOUT)
        return str(self._store.get(f"{name}/outcome").decode())
