"""Tracks the threads that are in calls of models, so that one thread can modify a model exclusively."""

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager


class CallThreads:
    """The threads that call models. A computation that is `alone` keeps calls of other threads waiting."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._inside: set[threading.Thread] = set()
        self._alone: threading.Thread | None = None
        self._training: weakref.WeakSet[threading.Thread] = weakref.WeakSet()

    @contextmanager
    def call(self, *, with_grad: bool, thread: threading.Thread | None = None) -> Iterator[None]:
        """The time of a call in this thread. It begins when no other thread computes alone.

        torch computes a backward pass in a thread of its own where a model is on a GPU. What is called there counts
        for the thread that made the call: `thread`.
        """
        # A forked child has only one thread, and perhaps a lock that another one held.
        if self._process != os.getpid():
            self._reset()
        own = thread or threading.current_thread()
        with self._changed:
            if with_grad:
                self._training.add(own)
            while self._alone is not None and self._alone != own:
                self._changed.wait()
            is_outermost = own not in self._inside
            self._inside.add(own)
        try:
            yield
        finally:
            if is_outermost:
                with self._changed:
                    self._inside.discard(own)

    @contextmanager
    def alone(self, thread: threading.Thread | None = None) -> Iterator[bool]:
        """Keep other threads out of calls, if none is in one and none has computed gradients; whether that is so.

        The backward pass of another thread is not a call of a model, but it reads modules and writes gradients too.
        `thread` is that of `call`.
        """
        if self._process != os.getpid():
            self._reset()
        own = thread or threading.current_thread()
        with self._changed:
            is_free = self._alone is None and not self._inside - {own}
            is_free &= all(other is own or not other.is_alive() for other in self._training)
            if is_free:
                self._alone = own
        try:
            yield is_free
        finally:
            if is_free:
                with self._changed:
                    self._alone = None
                    self._changed.notify_all()


CALL_THREADS = CallThreads()
"""The threads of this process."""
