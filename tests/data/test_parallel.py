"""Results and failures in the order of the items, and only a bounded number of items started ahead."""

import os
import threading
import time

import pytest

from purld.data.parallel import map_in_order


@pytest.mark.parametrize("batch", [1, 3])
def test_results_come_in_the_order_of_the_items(batch):
    def work(item):
        time.sleep(0.002 * (7 - item % 8))
        return item * item

    assert list(map_in_order(work, range(50), batch)) == [n * n for n in range(50)]
    assert list(map_in_order(work, [], batch)) == []


@pytest.mark.parametrize("batch", [1, 4])
def test_what_stops_the_items_is_raised_after_all_that_came_before(batch):
    def items():
        yield from range(6)
        raise OSError("the disk")

    seen = []
    with pytest.raises(OSError, match="the disk"):
        for result in map_in_order(lambda n: n, items(), batch):
            seen.append(result)
    assert seen == list(range(6))


def test_a_failure_is_raised_in_its_place():
    def work(item):
        if item >= 3:
            raise ValueError(f"item {item}")
        return item

    seen = []
    with pytest.raises(ValueError, match="item 3"):
        for result in map_in_order(work, range(100)):
            seen.append(result)
    assert seen == [0, 1, 2]


def test_little_is_begun_before_it_is_wanted():
    begun, lock = [], threading.Lock()

    def work(item):
        with lock:
            begun.append(item)
        return item

    results = map_in_order(work, range(10_000))
    assert next(results) == 0
    time.sleep(0.05)
    assert len(begun) <= 8 * 4 + 2 and (os.cpu_count() == 1 or len(begun) > 1)
    results.close()
