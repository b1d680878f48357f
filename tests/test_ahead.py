"""Items made in a thread: the same ones, their errors, and an end."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from fiited_ray.ahead import ahead

NAME = "test items"


def thread() -> threading.Thread | None:
    return next((each for each in threading.enumerate() if each.name == NAME), None)


def test_items_come_in_order_and_the_thread_ends_with_them() -> None:
    assert list(ahead(iter(range(100)), 2, NAME)) == list(range(100))
    if left := thread():
        left.join(10)
    assert thread() is None


def test_an_error_comes_out_as_it_is_after_the_items_before_it() -> None:
    wrong = ValueError("row 7 is bad")

    def items() -> Iterator[int]:
        yield 1
        raise wrong

    taken = ahead(items(), 2, NAME)
    assert next(taken) == 1
    with pytest.raises(ValueError, match="row 7 is bad") as raised:
        next(taken)
    assert raised.value is wrong


def test_closing_ends_a_thread_that_waits_for_room_with_no_further_item() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            yield number

    taken = ahead(items(), 1, NAME)
    assert next(taken) == 0
    worker = thread()
    assert worker is not None
    taken.close()
    worker.join(10)
    assert not worker.is_alive()
    assert len(made) <= 4  # the one taken, the one waiting, the one being made, and one while it was closed


def test_no_more_items_are_made_ahead_than_asked_for() -> None:
    begun = threading.Semaphore(0)
    made = []

    def items() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            begun.release()
            yield number

    taken = ahead(items(), 1, NAME)
    next(taken)
    for _ in range(3):  # one is taken, one waits, one is being made
        assert begun.acquire(timeout=10)
    assert not begun.acquire(timeout=0.2)
    assert made == [0, 1, 2]
    next(taken)
    assert begun.acquire(timeout=10)
    taken.close()


def test_operators_take_one_core_in_the_thread_and_as_many_as_before_outside() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert list(ahead((torch.get_num_threads() for _ in range(2)), 2, NAME)) == [1, 1]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
