from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from hpcnn.data.prefetch import Prefetcher


def test_items_come_in_order_and_end() -> None:
    fetcher = Prefetcher(iter(range(50)), 3)
    assert list(range(50)) == list(fetcher)
    assert [] == list(fetcher)
    fetcher.close()


def test_no_more_than_depth_items_are_made_ahead() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            yield number

    fetcher = Prefetcher(items(), 2)
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 3  # two that are ready, and one in hand
    fetcher.close()


def test_an_exception_comes_after_the_items_before_it_and_once() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ZeroDivisionError("in the thread")

    fetcher = Prefetcher(items(), 5)
    assert [1, 2] == [next(fetcher), next(fetcher)]
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        next(fetcher)
    with pytest.raises(StopIteration):
        next(fetcher)
    fetcher.close()


def test_closing_wakes_a_thread_that_waits_for_room() -> None:
    before = threading.active_count()
    fetcher = Prefetcher(iter(range(1000)), 1)
    next(fetcher)
    begin = time.monotonic()
    fetcher.close()
    fetcher.close()
    assert time.monotonic() - begin < 2
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(fetcher)


def test_closing_wakes_a_consumer_in_another_thread() -> None:
    stop = threading.Event()

    def items() -> Iterator[int]:
        stop.wait(10)
        yield 1

    fetcher, ended = Prefetcher(items(), 1), threading.Event()
    consumer = threading.Thread(target=lambda: (list(fetcher), ended.set()))
    consumer.start()
    closer = threading.Thread(target=fetcher.close)
    closer.start()
    assert ended.wait(5)
    stop.set()
    for thread in (consumer, closer):
        thread.join(5)
        assert not thread.is_alive()
