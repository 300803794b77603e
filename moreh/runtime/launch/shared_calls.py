"""Equal calls of several workers that run one script, of which one counts for all."""

import contextlib
import os
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, DistNetworkError, DistStoreError

# How long a worker may take for a call that it has begun, before the others do without its result.
TIMEOUT = timedelta(hours=1)
DONE = "done"
# Worker 0, which has the store if no launcher has it, has made all of the script's calls and ended.
ENDED = "worker 0 has ended"


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
        one of the operating system, else its text. `ENDED` if the call has not been made here, and the store has ended.
        """
        name = self._name(key)
        try:
            is_first = self._store.add(name, 1) == 1
            if not is_first:
                return self._outcome(name)
        except DistNetworkError:
            return ENDED
        self._make(name, call)
        return None

    def together(self, key: str, call: Callable[[], Any], workers: int, patience: timedelta) -> str | None:
        """Make the call on the last worker that arrives; returns the result of `first`.

        After `patience`, the first one goes ahead without those that have not come.
        """
        name = self._name(key)
        try:
            if not self._is_maker(name, workers, patience):
                return self._outcome(name)
        except DistNetworkError:
            return ENDED
        self._make(name, call)
        return None

    def count(self, key: str) -> int:
        """How often this worker has made a call."""
        return self._calls[key]

    def number(self, event: str) -> int:
        """1 for the worker that comes to an event first, 2 for the next one."""
        return int(self._store.add(f"moreh-files/{event}", 1))

    def announce(self, event: str) -> None:
        """Tell all workers that something has happened."""
        if self.are_here():
            with contextlib.suppress(DistNetworkError):
                self._store.set(f"moreh-files/{event}", "")

    def has(self, event: str) -> bool:
        """True if a worker has announced an event, or has ended with the store."""
        try:
            return bool(self._store.check([f"moreh-files/{event}"]))
        except DistNetworkError:
            return True

    def wait_for(self, event: str, patience: timedelta) -> None:
        """Wait until a worker has announced an event, at most for `patience`."""
        if self.are_here():
            with contextlib.suppress(DistError):
                self._store.wait([f"moreh-files/{event}"], patience)

    def _name(self, key: str) -> str:
        name = f"moreh-files/{key}/{self._calls[key]}"
        self._calls[key] += 1
        return name

    def _is_maker(self, name: str, workers: int, patience: timedelta) -> bool:
        """True if this worker is to make the call: it comes last, or has waited for the others."""
        number = self._store.add(name, 1)
        if number == 1:
            try:
                self._store.wait([f"{name}/outcome"], patience)
            except DistStoreError:
                return self._begins(name)
        return bool(number == workers) and self._begins(name)

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
            with contextlib.suppress(DistNetworkError):
                self._store.set(f"{name}/outcome", outcome)

    def _outcome(self, name: str) -> str:
        self._store.wait([f"{name}/outcome"], TIMEOUT)
        return str(self._store.get(f"{name}/outcome").decode())
