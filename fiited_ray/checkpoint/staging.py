"""Copies on their way from the training thread to the one that writes: a bounded queue."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Staging(Generic[Item]):
    """Items of known sizes; at any time those that are waiting or being written take at most `most_bytes`, or are one.

    With items of half that size one is filled while another is written, and training waits only when writing is slower than copying.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._used = 0
        self._items: deque[tuple[Item, int]] = deque()
        self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def room_for(self, size: int) -> None:
        """Wait until an item of this size may be made, and count it.

        Raises:
            BaseException: what the writing thread failed with.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._used == 0 or self._used + size <= self._most)
            if self._error is not None:
                raise self._error
            self._used += size

    def put(self, item: Item, size: int) -> None:
        """Hand over an item for which there is room."""
        with self._changed:
            self._items.append((item, size))
            self._changed.notify_all()

    def close(self) -> None:
        """No further item comes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def items(self) -> Iterator[Item]:
        """The items, in the writing thread, which is done with one when it asks for the next."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._closed)
                if not self._items:
                    return
                item, size = self._items.popleft()
            yield item
            del item
            with self._changed:
                self._used -= size
                self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Let go of the training thread: nothing is written any more."""
        with self._changed:
            self._error = error
            self._items.clear()
            self._changed.notify_all()
