"""A thread that makes the next items while the last one is in use."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Iterates over `items`, which a thread draws at most `depth` ahead.

    An exception while an item is made is raised where that item is asked for, and ends the iteration. `close` may be
    called at any time, any number of times; the thread has ended when it returns.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._items = items
        self._depth = depth
        self._ready: deque[T] = deque()
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._finished = False
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="hpcnn-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._finished or self._closed)
            if self._closed:
                raise StopIteration
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
        raise StopIteration

    def close(self) -> None:
        """Let the thread finish the item in hand, and drop what nobody asked for."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        try:
            for item in self._items:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                    if self._closed:
                        return
                    self._ready.append(item)
                    self._changed.notify_all()
                del item  # the consumer's now; its memory is free as soon as the consumer is done with it
        except BaseException as error:  # raised again in the consumer
            self._failure = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()
