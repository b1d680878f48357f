"""Making things in a thread, ahead of their use."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

import torch

Item = TypeVar("Item")


def ahead(items: Iterator[Item], waiting: int, name: str) -> Generator[Item, None, None]:
    """The same items, made in a thread of their own; `waiting` of them may lie finished while the next one is made.

    An error in the thread comes out here, as it is. When this iterator is closed the thread makes no further item.

    torch's operators take one core in that thread. With more threads than cores those of the consumer's operators would have to be woken
    for each, where they now wait awake.
    """
    torch.get_num_threads()  # settles the consumer's own number, which the first operator would otherwise take from the last that was set
    made: queue.Queue[Item | BaseException | None] = queue.Queue(waiting)
    closed = threading.Event()

    def work() -> None:
        torch.set_num_threads(1)
        try:
            for item in items:
                made.put(item)
                if closed.is_set():
                    return
            made.put(None)
        except BaseException as error:  # handed to the consumer, whatever it is
            made.put(error)

    threading.Thread(target=work, daemon=True, name=name).start()
    try:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        while not made.empty():  # a thread that waits for room goes on, and sees that it is to end
            made.get_nowait()
