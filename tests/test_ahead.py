"""Batches made ahead: in order, bounded, and without a thread left behind."""

import threading
import time

import pytest

from pipeline.process.ahead import made_ahead


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_results_come_in_order():
    with made_ahead(lambda number: number * number, range(3, 50)) as ahead:
        assert [ahead.next() for _ in range(3, 50)] == [number * number for number in range(3, 50)]
    assert threads() == []


def test_no_more_than_the_depth_is_made_before_it_is_asked_for():
    made = []
    with made_ahead(made.append, range(100), depth=3) as ahead:
        time.sleep(0.2)
        assert made == [0, 1, 2]
        ahead.next()
        time.sleep(0.2)
        assert made == [0, 1, 2, 3]


def test_several_threads_keep_the_order_and_the_depth():
    at_once, most, lock = 0, 0, threading.Lock()

    def make(number):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.03 * (5 - number % 5))
        with lock:
            at_once -= 1
        return number

    with made_ahead(make, range(20), depth=6, num_threads=3) as ahead:
        assert [ahead.next() for _ in range(20)] == list(range(20))
    assert most == 3 and threads() == []


def test_an_error_is_raised_where_its_result_is_asked_for():
    def make(number):
        if number == 2:
            raise OSError("gone")
        return number

    with made_ahead(make, range(5)) as ahead:
        assert [ahead.next(), ahead.next()] == [0, 1]
        with pytest.raises(OSError, match="gone"):
            ahead.next()
    assert threads() == []


def test_the_thread_ends_with_the_block_even_by_an_error():
    with pytest.raises(KeyError), made_ahead(lambda number: number, range(10**9)):
        raise KeyError
    assert threads() == []


def test_waiting_is_counted():
    with made_ahead(lambda number: time.sleep(0.05), range(4), depth=1) as ahead:
        for _ in range(4):
            ahead.next()
        assert 0.15 < ahead.waited_seconds < 2
    with made_ahead(lambda number: number, range(4)) as ahead:
        time.sleep(0.1)
        ahead.next()
        assert ahead.waited_seconds < 0.05
